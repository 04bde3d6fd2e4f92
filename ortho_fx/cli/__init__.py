# PYTHON_ARGCOMPLETE_OK
"""The command line, `ortho-fx`: one subcommand per file. A mistake of the user gives exit code 2 and one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ortho_fx.cli.mistakes import abandon_output, quoted, report, standard_streams
from ortho_fx.cli.parser import Parser
from ortho_fx.cli.plugins import load_plugins
from ortho_fx.errors import OrthoFxError, Terminated
from ortho_fx.version import __version__


def command() -> NoReturn:
    """What `ortho-fx` and `python -m ortho_fx.cli` run: `main`, and then the end of the process."""
    status = main()
    if os.environ.get("WORLD_SIZE"):  # of a launcher such as torchrun
        from ortho_fx.processes import leave

        leave(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for a mistake, 130 for an interrupt, 143 for SIGTERM.

    Any error is one line on the standard error; with ORTHO_FX_TRACEBACK=1, Python's traceback comes before it.
    """
    with standard_streams():
        code = _run(sys.argv[1:] if arguments is None else list(arguments))
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            abandon_output()
        except OSError as error:
            abandon_output()
            if code == 0:
                report(OrthoFxError(f"cannot write to the standard output: {error.strerror}"))
                return 2
        return code


def _run(arguments: Sequence[str]) -> int:
    parsed = None
    try:
        _refuse_invalid_bytes(arguments)
        load_plugins()
        parser = make_parser()
        _complete(parser)
        parsed = parser.parse_args(arguments)
        return parsed.run(parsed)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        abandon_output()
        if not getattr(parsed, "trains", False):
            return 0
        report(OrthoFxError("the standard output was closed before training was done, which ended it"))
        return 2
    except KeyboardInterrupt as interrupt:
        print(quoted("; ".join(filter(None, ("ortho-fx: interrupted", str(interrupt))))), file=sys.stderr)
        return 130
    except Terminated as end:
        print(quoted("; ".join(filter(None, ("ortho-fx: terminated", end.kept)))), file=sys.stderr)
        return 143
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        report(error)
        return 2


def _refuse_invalid_bytes(arguments: Sequence[str]) -> None:
    """A run writes its arguments to files in UTF-8, which should not fail after the work."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise OrthoFxError(f"arguments must be text in UTF-8; got {argument!r}: rename what it names") from None


def _complete(parser: Parser) -> None:
    """Answers a shell's request for completions and exits, if argcomplete is installed.

    The command has answered before, without PyTorch, unless a plugin is installed; see `ortho_fx.cli.completion`.
    """
    if "_ARGCOMPLETE" in os.environ:
        try:
            import argcomplete
        except ImportError:
            return
        from ortho_fx.cli.suggestions import suggest

        suggest(parser)
        argcomplete.autocomplete(parser)


def make_parser() -> Parser:
    """The parser of all commands. Its result holds the command's function as `run`."""
    # Imported here, because they import PyTorch, and completions are answered without it.
    from ortho_fx.cli import bench, compare, data, doctor, export, fit, harvest, plot, sample, sites, train

    parser = Parser(
        prog="ortho-fx",
        description="Learnable activations for PyTorch models.",
        epilog="exit codes: 0 done; 2 a mistake, told in one line on the standard error; 130 interrupted; 143 "
        "terminated (a training run saves first). ortho-fx COMMAND --help has examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ortho-fx {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (sites, train, compare, data, harvest, plot, sample, fit, bench, export, doctor):
        command.add(commands)
    return parser
