"""The line on a terminal says what is going on, and never wraps; a pipe gets lines of text alone."""

import io
import re
import sys
import time

import pytest

from ortho_fx.models.training.progress import Progress, fitted

PARTS = ("gpt2 hermite 3", 0.25, "375/1500", "loss 1.6310", "12,345 tokens/s", "1:23 left")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def terminal_of_40(monkeypatch):
    stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    for name, value in (("COLUMNS", "40"), ("LINES", "20"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    return stdout


def test_no_line_is_wider_than_the_terminal():
    for width in range(1, 150):
        assert len(fitted(width, *PARTS)) <= width


def test_what_matters_least_is_left_out_first():
    assert fitted(20, *PARTS) == "375/1500 loss 1.6310"
    assert fitted(30, *PARTS) == "375/1500 loss 1.6310 1:23 left"
    assert fitted(39, *PARTS) == "━━────── 375/1500 loss 1.6310 1:23 left"
    assert fitted(55, *PARTS) == "━━────── 375/1500 loss 1.6310 12,345 tokens/s 1:23 left"
    assert fitted(70, *PARTS) == "gpt2 hermite 3 ━━────── 375/1500 loss 1.6310 12,345 tokens/s 1:23 left"
    assert fitted(39, *PARTS, marks="=-").startswith("==------ ")


@pytest.mark.parametrize(("compiles", "state"), [(True, "compiling 0:00"), (False, "starting 0:00")])
def test_the_line_says_what_is_going_on(compiles, state):
    progress = Progress("run", 4, "tokens", first=1, compiles=compiles)
    assert progress.bar(22).endswith(f"1/4 {state}"[-22:])
    progress.step(2, 1.25, 10)
    assert progress.bar(15) == "2/4 loss 1.2500"
    since = time.perf_counter()
    progress.validating(3, 40)
    assert progress.bar(20) == "2/4 validating 3/40"
    progress.pause(since)
    assert progress.bar(15) == "2/4 loss 1.2500"
    rate = progress.step(3, 1.0, 10)
    assert f"3/4 loss 1.0000 {rate:,.0f} tokens/s 0:00 left" in progress.bar(150)


def test_a_terminal_of_40_columns_shows_one_line(monkeypatch):
    terminal = terminal_of_40(monkeypatch)
    with Progress("gpt2 hermite 3", 1500, "tokens", compiles=True) as progress:
        progress.step(1, 10.0, 10)
        progress.step(2, 9.0, 10)
        progress.line("step 2  [loss] 9.0")
        progress.line("a line that is too long " * 3, "a shorter one")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", terminal.getvalue())]
    assert any("0/1500 compiling 0:00" in line for line in lines)
    assert "step 2  [loss] 9.0" in lines
    assert "a shorter one" in lines
    assert any("2/1500 loss 9.0000" in line for line in lines)
    assert max(map(len, lines)) < 40


def test_a_terminal_that_cannot_overwrite_gets_lines_alone(monkeypatch):
    terminal = terminal_of_40(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with Progress("run", 2, "tokens") as progress:
        progress.step(1, 1.0, 10)
        progress.line("a line")
    assert terminal.getvalue() == "a line\n"


def test_a_pipe_gets_lines_alone(capsys):
    for shown in (True, False):
        with Progress("run", 2, "tokens", shown=shown) as progress:
            progress.step(1, 1.0, 10)
            progress.validating(1, 2)
            progress.line("a line", "a")
    assert capsys.readouterr().out == "a line\n"
