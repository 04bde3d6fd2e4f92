import io
import os
import subprocess
import sys

import pytest
import torch

from ortho_fx import cli
from ortho_fx.cli.mistakes import TRACEBACK, quoted, said, standard_streams
from ortho_fx.errors import OrthoFxError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OrthoFxError("it is a\nb"), r"it is a\nb"),
        (PermissionError(13, "Permission denied", "/x/\x1b[31m"), r"cannot use /x/\x1b[31m: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError("Unable to allocate 7 TiB"), "larger than memory, .* (Unable to allocate 7 TiB)"),
        (RecursionError("maximum"), "what was given is nested too deeply"),
        (KeyError("lost"), "KeyError: 'lost'; ORTHO_FX_TRACEBACK=1 shows where"),
    ],
)
def test_every_error_is_one_printable_line(error, line):
    text = said(error)
    assert text.isprintable()
    start, _, end = line.partition(".* ")
    assert start in text
    assert text.endswith(end)


def test_an_error_of_the_allocator_names_sizes():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert "choose smaller sizes" in said(caught.value)
    assert len(said(caught.value)) < 400


def test_a_long_message_keeps_its_ends():
    text = said(OrthoFxError("first" + "x" * 9000 + "last"))
    assert (text[:5], text[-4:], len(text) < 2100) == ("first", "last", True)


def test_names_are_quoted_and_letters_are_not():
    assert quoted("é 中 \x1b]0;owned\x07\u202e\udcff\n") == r"é 中 \x1b]0;owned\x07\u202e\udcff\n"
    assert quoted("a\n\tb", lines=True) == "a\n\tb"


def _broken(error):
    class Stream(io.StringIO):
        def flush(self):
            raise error

    return Stream()


def test_an_output_that_cannot_be_written_is_an_error_after_the_work(monkeypatch, capsys):
    monkeypatch.setattr(cli, "abandon_output", lambda: None)
    monkeypatch.setattr(cli, "_run", lambda arguments: 0)
    monkeypatch.setattr(sys, "stdout", _broken(OSError(28, "No space left on device")))
    assert cli.main(["fit", "gelu"]) == 2
    assert capsys.readouterr().err == (
        "ortho-fx: error: cannot write to the standard output: No space left on device\n"
    )


@pytest.mark.parametrize(("trains", "code", "lines"), [(True, 2, 1), (False, 0, 0)])
def test_a_reader_that_is_gone_ends_training_with_an_error(monkeypatch, capsys, trains, code, lines):
    def run(parsed):
        raise BrokenPipeError

    class Parser:
        def parse_args(self, arguments):
            return type("Parsed", (), {"trains": trains, "run": staticmethod(run)})

    monkeypatch.setattr(cli, "abandon_output", lambda: None)
    monkeypatch.setattr(cli, "make_parser", Parser)
    assert cli.main([]) == code
    assert capsys.readouterr().err.count("\n") == lines


def test_lines_that_nobody_reads_end_a_command_and_say_what_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(cli, "abandon_output", lambda: None)
    monkeypatch.setattr(sys, "stdout", _broken(BrokenPipeError(32, "Broken pipe")))
    assert cli.main(["train", "gpt2", "--out", "run"]) == 2
    assert capsys.readouterr().err.endswith(
        ": cannot write to the standard output: Broken pipe; nothing in run was changed: run the command again\n"
    )


def test_the_traceback_is_shown_on_demand(monkeypatch, capsys):
    monkeypatch.setenv(TRACEBACK, "1")
    assert cli.main(["no-such-command"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_stream_that_is_closed_leads_nowhere(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with standard_streams():
        print("lost")
        assert sys.stdout is not None
    assert sys.stdout is None


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&-", "2>&-", "> /dev/full", "< /dev/null >&- 2>&-"])
def test_streams_of_a_shell(redirection):
    command = f'"{sys.executable}" -m ortho_fx.cli fit gelu --degree 2 {redirection}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == (2 if "full" in redirection else 0)
    assert done.stderr.count("\n") == (1 if "full" in redirection else 0)
