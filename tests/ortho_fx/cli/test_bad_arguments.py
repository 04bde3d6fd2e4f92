"""Wrong values of every option of every command, made from the parser: one line, exit code 2, no traceback."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from ortho_fx.cli import main, make_parser
from ortho_fx.cli.parser import Number, Whole

_PARSER = make_parser()
(_SUBPARSERS,) = (action for action in _PARSER._actions if isinstance(action, argparse._SubParsersAction))
COMMANDS = _SUBPARSERS.choices
# Positional arguments that a command needs before it looks at its options' values.
_GIVEN = {
    "sites": ["gpt2"],
    "train": ["gpt2"],
    "compare": ["gpt2", "--activations", "gelu", "--out", "compared"],
    "data": ["text.txt", "tokens"],
    "harvest": ["run", "--out", "preset.json"],
    "plot": ["run"],
    "sample": ["run"],
    "fit": ["gelu"],
    "bench": [],
    "export": ["run", "model.pt2"],
    "doctor": [],
}
_WHOLE = [
    "",
    " ",
    "x",
    "1.5",
    "nan",
    "inf",
    "-1",
    "1e309",
    "\uff11\uff12",
    "1_000",
    "0x10",
    "1" + "0" * 100,
    "9" * 5000,
]
_NUMBER = ["", "x", "nan", "-nan", "1e309", "-1e309", "\u0661", "1,5", "0x1p3", "1_0"]
# Options of text with few values that are right; a wrong one is refused before work starts.
_NAMES = {"basis", "size", "init", "granularity", "dtype", "device", "parallel", "augment", "what", "mode", "bases"}
_NAMES |= {"targets", "sharing", "weight", "activations", "reference", "log", "to"}
_WRONG_NAMES = ["", "no such name", "\x1b[31mred", "two\northo-fx: error: lines", "x" * 5000]


def _bad_values(action):
    if isinstance(action.type, Whole):
        return _WHOLE
    if isinstance(action.type, Number):
        return _NUMBER
    return _WRONG_NAMES if action.dest in _NAMES else []


def _rows():
    rows = [[], ["no-such-command"], ["\x1b[31m"], ["--no-such-option"]]
    for name, command in COMMANDS.items():
        start = [name, *_GIVEN[name]]
        rows += [[*start, "--no-such-option"], [*start, "--no\npe"], [*start, "--speed=9"]]
        if _GIVEN[name]:
            rows.append([name])
        for action in command._actions:
            if not action.option_strings or isinstance(action, argparse._HelpAction):
                continue
            option = action.option_strings[-1]
            if action.nargs == 0:
                rows.append([*start, f"{option}=yes"])
                continue
            rows += [[*start, option], [*start, option, "\udcff"]]
            count = action.nargs if isinstance(action.nargs, int) else 1
            rows += [[*start, *_assigned(option, value, count)] for value in _bad_values(action)]
    return rows


def _assigned(option, value, count):
    return [f"{option}={value}"] if count == 1 else [option, *[value or "x"] * count]


ROWS = _rows()


def test_the_table_is_large():
    assert len(ROWS) >= 300
    assert {row[0] for row in ROWS if row} >= set(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_a_wrong_argument_is_one_line_and_exit_code_2(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ortho_fx.cli.make_parser", lambda: _PARSER)  # as it is, made once
    # In this order: a module that is first imported now would otherwise keep what stands for another's function.
    for work in ("compare.execute.train", "training.loop.train", "data.prepare.prepare"):
        monkeypatch.setattr(f"ortho_fx.models.{work}", _started)
    for row in ROWS:
        if (row[0] if row and row[0] in COMMANDS else "") != command:
            continue
        code = main(row)
        out, err = capsys.readouterr()
        assert code == 2, row
        assert out == "", row
        assert re.fullmatch(r"ortho-fx: error: [^\x00-\x1f\x7f]+\n", err), (row, err)
        assert "Traceback" not in err
        assert "shows where" not in err, (row, err)  # what main() knows no better text for
        assert len(err) < 2500, row
    assert list(tmp_path.iterdir()) == []


def _started(*arguments, **settings):
    raise AssertionError("work has started")


def _examples():
    """The commands that help texts and pages show."""
    texts = [command.epilog or "" for command in COMMANDS.values()]
    found = [text for epilog in texts for text in re.findall(r"(?<![\w-])ortho-fx ([a-z][^;:]*?)(?=;|$)", epilog)]
    for page in [Path("README.md"), *Path("docs").rglob("*.md")]:
        for block in re.findall(r"```[a-z]*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = [line.strip().removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]
            found += [line.removeprefix("ortho-fx ") for line in lines if re.match("ortho-fx [a-z]", line)]
    return sorted(set(found))


@pytest.mark.parametrize("example", _examples())
def test_every_example_parses(example):
    arguments = shlex.split(re.split(r"\s[|>#&]", example)[0], comments=True)
    assert _PARSER.parse_args(arguments).run


def test_every_command_has_an_example():
    assert {example.split()[0] for example in _examples()} >= set(COMMANDS)
