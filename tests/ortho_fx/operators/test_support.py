"""Future releases of PyTorch: a private name is missing, or behaves differently."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ortho_fx
from ortho_fx import cli, torch_private
from ortho_fx.bases import BASES
from ortho_fx.operators import support

pytestmark = pytest.mark.slow

# One name of a group stands for three others: whichever is missing, its group is lost.
NAMES = sorted({entry.path for group in torch_private.GROUPS for entry in group.names[::4]})
# Without these names nothing is lost silently: tools that read generated code raise, and the compiler's name has a
# substitute. So there is no warning.
SILENT = (torch_private.TOOLS, torch_private.TOOLCHAIN)


def groups_of(path):
    return [group for group in torch_private.GROUPS if path in (entry.path for entry in group.names)]


@pytest.mark.parametrize("path", NAMES)
def test_a_release_without_a_private_name_is_right_and_says_what_it_lost(ask, path):
    groups = groups_of(path)
    lacked = any(
        entry.path == path and torch_private.release() in entry.releases for group in groups for entry in group.names
    )
    found = ask(
        absent=path,
        dynamic=torch_private.SHAPES in groups,
        hook=torch_private.HOOK in groups or torch_private.INDUCTOR_BACKEND in groups,
        checked=torch_private.TREES in groups,
    )
    assert found["error"] < 1e-4
    told = [group for group in groups if group not in SILENT and group != torch_private.INDUCTOR_BACKEND]
    assert len(found["warnings"]) == (len(told) if lacked else 0)
    for group in told if lacked else ():
        (warning,) = (text for text in found["warnings"] if group.title in text)
        assert f"PyTorch {torch.__version__} has no {path}" in warning
        assert group.without in warning
        assert "tested with PyTorch" in warning
    lowered = torch_private.INDUCTOR not in groups or not lacked
    assert all((why is None) == lowered for why in found["reasons"].values()), found["reasons"]
    if torch_private.HOOK in groups:
        assert "call ortho_fx.rewrite_(model, config) before torch.compile(model)" in found["hook"]["plain"]
        assert found["hook"]["rewritten"].startswith("off by "), found["hook"]


@pytest.mark.parametrize("where", ["registration", "lower of a forward", "lower of a backward", "code generation"])
def test_a_lowering_that_raises_is_replaced(ask, where):
    found = ask(raises=where)
    assert found["error"] < 1e-4
    (warning,) = found["warnings"]
    assert f"ortho_fx: on PyTorch {torch.__version__} the fused lowering raised " in warning
    assert "boom" in warning
    assert torch_private.INDUCTOR.without in warning
    assert all(found["reasons"].values()), found["reasons"]


def test_on_a_release_of_the_future_the_lowering_is_checked_once(ask, cache, tmp_path):
    # For the process that checks.
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.__version__ = type(torch.__version__)('2.99.0')\n")
    future = {"release": "2.99.0", "path": str(tmp_path)}
    assert ask(**future) == {"reason": None, "warnings": []}
    (file,) = (cache / "ortho_fx").glob("lowering-*.json")
    assert json.loads(file.read_text()) == {"hermite": None}
    # Later processes trust the result of the check.
    file.write_text('{"hermite": "the numbers are wrong"}')
    found = ask(**future)
    assert found["reason"] == "the numbers are wrong"
    (warning,) = found["warnings"]
    assert warning.startswith("ortho_fx: the numbers are wrong. Without that, ")


def test_a_check_that_crashes_says_nothing_about_other_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(support.sys, "executable", "/bin/false")
    assert "did not end well" in support._verdict(BASES["hermite"], "cpu", check=True)
    assert not list(tmp_path.rglob("lowering-*"))


def test_the_check_finds_wrong_numbers(monkeypatch):
    from ortho_fx.operators import check

    assert check.wrong(BASES["hermite"], "cpu") is None
    exact = check._exact
    monkeypatch.setattr(check, "_exact", lambda *a: [1.01 * result for result in exact(*a)])
    assert "computes another number: off by 9.9e-03" in check.wrong(BASES["hermite"], "cpu")


@pytest.mark.smoke
def test_the_report_names_what_is_fused(capsys):
    report = ortho_fx.compile_support()
    assert report.tested
    assert report.fallbacks == {"cpu": {}} or torch.cuda.is_available()
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out == f"{report}\n"
    assert f"ortho_fx {ortho_fx.__version__}, PyTorch {torch.__version__}, Python " in out
    assert "fused on cpu: hermite, fourier, tropical, tropical_rational" in out
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cpp_compiler"] == report.cpp_compiler


def test_the_report_names_what_is_lost(ask):
    done = ask(command=["doctor"], absent="torch._inductor.ir.Pointwise")
    assert done["code"] == 0
    assert "fused on cpu: nothing\nplain operations on cpu: hermite: PyTorch" in done["out"]
    assert f"without {torch_private.INDUCTOR.title}: " in done["out"]
    assert done["err"] == ""


def test_an_old_pytorch_is_refused_in_one_sentence():
    code = "import torch; torch.__version__ = '2.10.1'; import ortho_fx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last == "ImportError: ortho_fx needs PyTorch 2.11 or newer, and 2.10.1 is installed"


NO_COMPILER = """
import contextlib, io, json, sys, traceback
import torch
from torch import nn
from ortho_fx import cli
model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
try:
    torch.compile(model, backend="ortho_fx")(torch.randn(4, 8))
except Exception as error:
    results = [traceback.format_exception(error)[-1]]
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(command)
    results.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps(results))
"""


def test_a_missing_cpp_compiler_is_named(tmp_path):
    environment = {**os.environ, "CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    commands = [["train", "gpt2"], ["bench"], ["doctor"]]
    process = [sys.executable, "-c", NO_COMPILER, json.dumps(commands)]
    done = subprocess.run(process, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    error, train, bench, doctor = json.loads(done.stdout)
    said = (
        "no C++ compiler works here (tried 'no-compiler'), and torch.compile needs one on a CPU: install g++ or "
        "clang++, or name one by the environment variable CXX; eager mode works without one"
    )
    assert error == f"ortho_fx.rewriting.hook.CompileError: {said}\n"
    otherwise = "train without compiling: --no-compile, or compile = false in the recipe"
    for refused, instead in ((train, otherwise), (bench, "measure eager mode: --eager")):
        assert (refused["code"], refused["err"]) == (2, f"ortho-fx: error: {said}; or {instead}\n")
    assert doctor["code"] == 0
    assert f"C++ compiler: {said}" in doctor["out"]


def test_the_factor_that_the_warning_names_was_measured():
    file = Path(__file__).parents[3] / "benchmarks" / "results" / "lowering_cpu.json"
    rows = [row for record in json.loads(file.read_text()).values() for row in record["rows"].values()]
    largest = math.ceil(10 * max(row["plain / own"] for row in rows)) / 10
    assert f"up to {largest} times slower" in torch_private.INDUCTOR.without
