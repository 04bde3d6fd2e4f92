"""The installed package: one top-level name, no needless imports, and operators that Python's stock tools can read."""

import importlib.metadata
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ortho_fx
from tests.wheel import contents, sources

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # An earlier build lies there, and setuptools would take modules from it that are gone since.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_ortho_fx_alone(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert all(name.startswith("ortho_fx/") for name in contents(wheel))
    assert contents(wheel) == sources()


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import ortho_fx; new = set(sys.modules) - before; "
        "print(*({m.split('.')[0] for m in new} - sys.stdlib_module_names)); "
        "print(*(m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    third_parties, compilers = done.stdout.splitlines()
    assert set(third_parties.split()) <= {"ortho_fx", "numpy"}
    assert not compilers


def test_the_version_stands_in_one_place():
    assert ortho_fx.__version__ == importlib.metadata.version("ortho-fx")
    assert ortho_fx.__version__ not in (ROOT / "pyproject.toml").read_text()
    assert f"## {ortho_fx.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {ortho_fx.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_the_installed_wheel_works_without_a_compiler(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", tmp_path, wheel]
    subprocess.run(command, check=True, capture_output=True)
    code = """
    import sys
    # An editable installation goes before every path.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    import torch, ortho_fx
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    for basis in ("hermite", "fourier", "tropical", "tropical_rational"):
        ortho_fx.rewrite_(model, ortho_fx.ExpansionConfig(basis))
        ortho_fx.calibrate_(model, [torch.randn(64, 8)])
        model(torch.randn(4, 8)).sum().backward()
        ortho_fx.revert_(model)
    print(ortho_fx.__file__)
    """
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "", "CXX": "/dev/null", "CC": "/dev/null"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(str(tmp_path))
