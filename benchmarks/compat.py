"""What works on which release of PyTorch.

    python benchmarks/compat.py run [--releases 2.13.0 2.15.0] [--out FILE]
    python benchmarks/compat.py run --env ENVIRONMENT
    python benchmarks/compat.py check [--out FILE]
    python benchmarks/compat.py table

`run` makes a virtual environment for each release in turn, in a temporary folder, installs PyTorch, numpy and this
repository there, runs `check` in it, removes it, and merges the record into results/compat.json. Releases that are not
run keep their record. `--env` takes an environment that has PyTorch and setuptools already, and leaves it as it is.
`check` runs `compat_checks.py` on the PyTorch that is installed, and prints the record or writes it to a file.
`table` prints the records as the table of README.md. `run` and `check` exit with 1 where a row failed.

`run` and `table` need Python alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compat.json"
# The newest patch of each minor release since the oldest that works.
RELEASES = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
# A CUDA build takes 5.5 GB, and its archives as much again while pip unpacks them.
GIGABYTES = 12
CHECK_SECONDS = 1800

# One release: `release`, `torch`, `python`, `numpy`, `date`, `cpu`, `build`, `seconds`, and `rows`, each
# [check, case, whether it is right, what was seen].
Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="check releases, each in an environment of its own")
    runs.add_argument("--releases", nargs="+", default=RELEASES, metavar="RELEASE")
    runs.add_argument("--env", type=Path, help="an existing environment, in place of new ones")
    runs.add_argument("--out", type=Path, default=RESULT)
    checks = commands.add_parser("check", help="check the installed PyTorch")
    checks.add_argument("--out", type=Path)
    commands.add_parser("table", help="print the table")
    chosen = parser.parse_args(arguments)
    if chosen.command == "table":
        print(table(read(RESULT)))
        return 0
    if chosen.command == "check":
        # Imported here: the other commands run without PyTorch.
        from compat_checks import check

        record = check(chosen.out)
        if chosen.out is None:
            print(written({record["release"]: record}), end="")
        return int(bool(failures(record)))
    return run(chosen.releases, chosen.env, chosen.out)


def run(releases: Sequence[str], environment: Path | None, out: Path) -> int:
    """Checks the releases, or the one of an existing environment; 1 where something failed."""
    failed = False
    for release in releases if environment is None else (environment.name,):
        with tempfile.TemporaryDirectory(prefix="compat-") as folder:
            try:
                record = checked(release, environment and environment.absolute(), Path(folder))
            except (subprocess.SubprocessError, OSError, ValueError) as error:
                print(f"{release} was not measured: {error}", file=sys.stderr)
                failed = True
                continue
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(written(merged(read(out), record)))
        wrong = failures(record)
        failed |= bool(wrong)
        print(f"PyTorch {record['release']}: {len(record['rows'])} rows, {len(wrong)} failed", flush=True)
        for check, case, _, seen in wrong:
            print(f"  {check}, {case}: {seen}", flush=True)
    return int(failed)


def checked(release: str, environment: Path | None, folder: Path) -> Record:
    """The record of one release, measured in a child process; everything that is made for it is in the folder."""
    # What is set here is not the release's doing.
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TORCH", "ORTHO_FX"))}
    variables |= {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "PIP_NO_CACHE_DIR": "1"}
    python = folder / "environment" / "bin" / "python"
    source = copy_of_source(folder / "source")
    install = ["-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    ours = [*install, "--no-deps", "--no-build-isolation"]

    def call(*command: str | Path, **keywords: Any) -> int:
        return subprocess.run([*command], env=variables, cwd=folder, **keywords).returncode

    if environment is None:
        free = shutil.disk_usage(folder).free / 1e9
        print(f"PyTorch {release}: {free:.0f} GB are free in {folder.parent}, {GIGABYTES} may be needed", flush=True)
        if free < GIGABYTES:
            raise OSError(f"{free:.0f} GB are free in {folder.parent}, and {GIGABYTES} may be needed")
        call(sys.executable, "-m", "venv", folder / "environment", check=True)
        call(python, *install, f"torch=={release}", "numpy", "setuptools>=77", check=True)
        call(python, *ours, source, check=True)
    else:
        python = environment / "bin" / "python"
        call(python, *ours, "--target", folder / "installed", source, check=True)
        variables["PYTHONPATH"] = str(folder / "installed")
    file = folder / "record.json"
    with contextlib.suppress(subprocess.TimeoutExpired):  # the rows that it did not reach have failed
        call(python, Path(__file__).resolve(), "check", "--out", file, timeout=CHECK_SECONDS)
    if not file.exists():
        raise ValueError("the check ended before it had a row")
    (record,) = read(file).values()
    return record


def copy_of_source(target: Path) -> Path:
    """What the package is built from, elsewhere: a build writes beside it."""
    target.mkdir()
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, target)
    for name in ("ortho_fx", "passes", "models"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def failures(record: Record) -> list[Sequence[Any]]:
    return [row for row in record["rows"] if not row[2]]


def merged(records: Mapping[str, Record], record: Record) -> dict[str, Record]:
    """The records with this one, the newest release first."""
    both = {**records, record["release"]: record}
    order = sorted(both, key=lambda release: [int(n) for n in re.findall(r"\d+", release)], reverse=True)
    return {release: both[release] for release in order}


def read(file: Path) -> dict[str, Record]:
    return json.loads(file.read_text()) if file.exists() else {}


def written(records: Mapping[str, Record]) -> str:
    """The records as JSON, a row of theirs a line."""
    blocks = []
    for release, record in records.items():
        head = "".join(f"  {json.dumps(k)}: {json.dumps(v)},\n" for k, v in record.items() if k != "rows")
        rows = ",\n".join(f"   {json.dumps(row)}" for row in record["rows"])
        blocks.append(f" {json.dumps(release)}: {{\n{head}" + f'  "rows": [\n{rows}\n  ]\n }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


COLUMNS = ("lowering", "values", "plain", "readme", "hook", "transforms", "export", "ddp", "warnings", "kernels")


def table(records: Mapping[str, Record]) -> str:
    """The records in Markdown, a release a row."""
    titles = {"plain": "values without it", "readme": "README", "ddp": "DDP"}
    head = ["PyTorch", "build", *(titles.get(column, column) for column in COLUMNS)]
    lines = [head, ["---"] * len(head)]
    for release, record in records.items():
        lines.append([release, record["build"], *(cell(record, column) for column in COLUMNS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(record: Record, check: str) -> str:
    """One check of a release: its rows that are right, of all, in bold where some are not; and a summary."""
    rows = [row for row in record["rows"] if row[0] == check]
    right = [row for row in rows if row[2]]
    text = f"{len(right)} of {len(rows)}"
    if check == "lowering":
        text = "used" if right == rows else "fallback" if not right else f"used in {text}"
    elif check == "warnings":
        text = "none" if right == rows else str(len(rows))
    elif check == "kernels" and right:
        text = " / ".join(str(sum(sum(row[3][way]) for row in right)) for way in ("lowering", "plain"))
    elif check in ("values", "plain") and right:
        text += f", {max(row[3] for row in right):.0e}"
    return text if right == rows else f"**{text}**"


if __name__ == "__main__":
    sys.exit(main())
