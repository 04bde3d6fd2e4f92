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

SERVER = Path(__file__).parents[2] / "future_server.py"
NAMES = sorted({entry.path for group in torch_private.GROUPS for entry in group.names})
# Without these names nothing is lost silently: tools that read generated code raise, and the compiler's name has a
# substitute. So there is no warning.
SILENT = (torch_private.TOOLS, torch_private.TOOLCHAIN)


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Runs a case in a process of its own, which has PyTorch and its compiler already."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    # Its text, not its path: with a path, imports would look in tests/ first, which has a folder ortho_fx.
    command = [sys.executable, "-c", SERVER.read_text()]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def answer(**case):
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            assert "failed" not in found, found["failed"]
            return found

        yield answer
        process.stdin.close()


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


@pytest.fixture
def future(tmp_path, monkeypatch):
    """The environment of a process in which PyTorch says that it is a release of the future."""
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.__version__ = type(torch.__version__)('2.99.0')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}


STEP = """
import json, time, torch
from ortho_fx import HermiteActivation
from ortho_fx.bases import BASES
from ortho_fx.operators import support
a, x = HermiteActivation(3), torch.randn(8, 16)
results = []
for call in (a, torch.compile(a)):
    y = call(x.requires_grad_())
    results.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *a.parameters()])])
torch.testing.assert_close(*results)
print(json.dumps([torch.__version__, support.reason(BASES["hermite"])]))
"""


def step(environment):
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_on_a_release_of_the_future_the_lowering_is_checked_once(future):
    assert step(future)[0] == ["2.99.0", None]
    (file,) = Path(future["TORCHINDUCTOR_CACHE_DIR"], "ortho_fx").glob("lowering-*.json")
    assert json.loads(file.read_text()) == {"hermite": None}
    # Later processes trust the result of the check.
    file.write_text('{"hermite": "the numbers are wrong"}')
    (version, reason), errors = step(future)
    assert (version, reason) == ("2.99.0", "the numbers are wrong")
    assert errors.count("ortho_fx: the numbers are wrong. Without that, ") == 1


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


def test_the_report_names_what_is_lost():
    environment = {**os.environ, "ORTHO_FX_ABSENT_NAMES": "torch._inductor.ir.Pointwise"}
    command = [sys.executable, "-m", "ortho_fx.cli", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "fused on cpu: nothing\nplain operations on cpu: hermite: PyTorch" in done.stdout
    assert f"without {torch_private.INDUCTOR.title}: " in done.stdout
    assert done.stderr == ""


def test_an_old_pytorch_is_refused_in_one_sentence():
    code = "import torch; torch.__version__ = '2.10.1'; import ortho_fx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last == "ImportError: ortho_fx needs PyTorch 2.11 or newer, and 2.10.1 is installed"


NO_COMPILER = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
torch.compile(model, backend="ortho_fx")(torch.randn(4, 8))
"""


def test_a_missing_cpp_compiler_is_named(tmp_path):
    environment = {**os.environ, "CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    said = (
        "no C++ compiler works here (tried 'no-compiler'), and torch.compile needs one on a CPU: install g++ or "
        "clang++, or name one by the environment variable CXX; eager mode works without one"
    )
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"ortho_fx.rewriting.hook.CompileError: {said}"
    for arguments, otherwise in (
        (["train", "gpt2"], "train without compiling: --no-compile, or compile = false in the recipe"),
        (["bench"], "measure eager mode: --eager"),
    ):
        command = [sys.executable, "-m", "ortho_fx.cli", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, f"ortho-fx: error: {said}; or {otherwise}\n")
    command = [sys.executable, "-m", "ortho_fx.cli", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"C++ compiler: {said}" in done.stdout


def test_the_factor_that_the_warning_names_was_measured():
    file = SERVER.parents[1] / "benchmarks" / "results" / "lowering_cpu.json"
    rows = [row for record in json.loads(file.read_text()).values() for row in record["rows"].values()]
    largest = math.ceil(10 * max(row["plain / own"] for row in rows)) / 10
    assert f"up to {largest} times slower" in torch_private.INDUCTOR.without
