# PYTHON_ARGCOMPLETE_OK
"""The command line, `ortho-fx`: one subcommand per file. A mistake of the user gives exit code 2 and one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ortho_fx.cli.completion import PLUGINS
from ortho_fx.cli.parser import Parser
from ortho_fx.errors import OrthoFxError, Terminated
from ortho_fx.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for a user's mistake, 130 for an interrupt, 143 for SIGTERM."""
    try:
        _load_plugins()
        parser = make_parser()
        _complete(parser)
        parsed = parser.parse_args(arguments)
        return parsed.run(parsed)
    except OrthoFxError as error:
        print(f"ortho-fx: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        print("; ".join(filter(None, ("ortho-fx: interrupted", str(interrupt)))), file=sys.stderr)
        return 130
    except Terminated as end:
        print("; ".join(filter(None, ("ortho-fx: terminated", end.kept))), file=sys.stderr)
        return 143


def _load_plugins() -> None:
    """Imports the modules that installed packages name in our entry points: they register bases and activations."""
    import importlib.metadata

    for group in PLUGINS:
        for entry in importlib.metadata.entry_points(group=group):
            try:
                entry.load()
            except Exception as error:
                raise OrthoFxError(f"the entry point {entry.name} = {entry.value} of {group}: {error}") from error


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
    from ortho_fx.cli import bench, compare, data, doctor, export, fit, plot, sites, train

    parser = Parser(
        prog="ortho-fx",
        description="Learnable activations for PyTorch models.",
        epilog="exit codes: 0 done; 2 a mistake, told in one line on the standard error; 130 interrupted; 143 "
        "terminated (a training run saves first). ortho-fx COMMAND --help has examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ortho-fx {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (sites, train, compare, data, plot, fit, bench, export, doctor):
        command.add(commands)
    return parser
