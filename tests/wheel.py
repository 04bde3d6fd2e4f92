"""Checks a wheel in an environment that holds it and what it requires, nothing else. `make wheel` runs this there:

python tests/wheel.py dist/ortho_fx-0.1.0-py3-none-any.whl
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent


def sources() -> set[str]:
    """What the wheel must hold of the repository, by the paths that it has there."""
    kept = {".py", ".toml", ".json", ".typed"}
    folders = {"ortho_fx": ROOT / "ortho_fx", "ortho_fx/passes": ROOT / "passes", "ortho_fx/models": ROOT / "models"}
    return {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in folders.items()
        for path in folder.rglob("*")
        if path.suffix in kept
    }


def contents(wheel: Path) -> set[str]:
    """What a wheel holds, without what describes it."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def modules() -> list[str]:
    """Every module of the installed package. Those that are for another library, or are commands, are left out."""
    import ortho_fx

    assert Path(ortho_fx.__file__).is_relative_to(sys.prefix), f"{ortho_fx.__file__} is not in {sys.prefix}"
    names = [module.name for module in pkgutil.walk_packages(ortho_fx.__path__, "ortho_fx.")]
    return [name for name in names if ".integrations." not in name and not name.endswith("__main__")]


def main() -> None:
    (wheel,) = map(Path, sys.argv[1:])
    differing = contents(wheel) ^ sources()
    assert not differing, f"in the wheel or in the repository alone: {', '.join(sorted(differing))}"
    for name in modules():
        importlib.import_module(name)
    command = Path(sys.executable).with_name("ortho-fx")
    block = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    with tempfile.TemporaryDirectory() as folder:
        for arguments in (
            [command, "--version"],
            [command, "doctor"],
            [command, "sites", "gpt2"],
            [sys.executable, "-c", block[1]],
        ):
            subprocess.run(arguments, cwd=folder, check=True)
    print(f"{wheel.name}: {len(contents(wheel))} files, {len(modules())} modules import, README's first block runs")
    print(*sorted(f"{one.metadata['Name']} {one.version}" for one in metadata.distributions()), sep=", ")


if __name__ == "__main__":
    main()
