"""Completions come without PyTorch, and are those of the parser."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ortho_fx.bases import BASES
from ortho_fx.cli import make_parser
from ortho_fx.cli.completion import FILE, Completer
from ortho_fx.cli.suggestions import described, suggestions

ROOT = Path(__file__).parents[3]


def test_the_file_is_that_of_the_parser():
    assert json.loads(FILE.read_text(encoding="utf-8")) == described(make_parser()), "run `make completions`"


def test_every_suggestion_is_for_an_argument():
    (commands,) = (action.choices for action in make_parser()._actions if isinstance(action.choices, dict))
    known = suggestions()
    assert list(known) == list(commands)
    for name, command in commands.items():
        assert known[name].keys() <= {action.dest for action in command._actions}


def test_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.toml", "b.txt", ".hidden.toml"):
        (tmp_path / name).write_text("")
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "c.toml").write_text("")
    recipes = Completer({"values": ["gpt2"], "files": [".toml"]})
    assert recipes("") == ["gpt2", "a.toml", "runs/"]
    assert recipes("runs/") == ["gpt2", "runs/c.toml", "runs/one/"]
    assert recipes(f"{tmp_path}/r") == ["gpt2", f"{tmp_path}/runs/"]
    assert recipes(".h") == ["gpt2", ".hidden.toml"]
    assert recipes("missing/") == ["gpt2"]
    assert Completer({"files": []})("") == ["runs/"]


def test_names_of_new_files():
    out = Completer({"new": [".onnx", ".pt2"]})
    assert out("") == []
    assert out("model") == ["model.onnx", "model.pt2"]
    assert out("v1.model") == ["v1.model.onnx", "v1.model.pt2"]
    assert out("model.p") == ["model.pt2"]
    assert out("model.onnx") == out("folder/") == []


def complete(line, folder, name="ortho-fx"):
    """The completions of a line for the installed command, with a PyTorch that cannot be imported."""
    (folder / "torch.py").write_text("raise RuntimeError('PyTorch was imported')")
    command = folder / name
    command.write_text("import sys\nfrom ortho_fx.cli import main\nsys.exit(main())\n")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout"}
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = {**os.environ, **asked, "PYTHONPATH": path}
    return subprocess.run([sys.executable, command], env=environment, capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ortho-fx exp", ["export"]),
        ("ortho-fx train gpt2 --basis ", [*BASES, "none"]),
        ("ortho-fx train convnext --size sm", ["small"]),
        ("ortho-fx fit gel", ["gelu"]),
        ("ortho-fx export run model.o", ["model.onnx"]),
        ("ortho-fx bench --what gpt2 --mode r", ["reduce-overhead"]),
        ("ortho-fx train gpt2 --tie", ["--tied"]),
    ],
)
def test_a_shell_gets_an_answer_without_pytorch(line, words, tmp_path):
    done = complete(line, tmp_path)
    assert done.stderr == ""
    assert [word.strip() for word in done.stdout.split("\n")] == words


@pytest.mark.slow
def test_a_program_that_imports_ortho_fx_answers_for_itself(tmp_path):
    done = complete("train.py --ba", tmp_path, "train.py")
    assert "PyTorch was imported" in done.stderr
