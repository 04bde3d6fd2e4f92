"""What a user installs: one top-level name, no needless imports, and operators that Python's stock tools can read."""

import subprocess
import sys
import zipfile
from pathlib import Path

import ortho_fx

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_ortho_fx_alone(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ortho_fx"}
    for name in ("py.typed", "passes/find.py", "models/gpt2.py", "models/recipes/gpt2-small.toml", "bases/hermite.py"):
        assert f"ortho_fx/{name}" in names


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
    assert f'version = "{ortho_fx.__version__}"' in (ROOT / "pyproject.toml").read_text()
