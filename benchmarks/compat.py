"""What works on which release of PyTorch.

    python benchmarks/compat.py run [--releases 2.13.0 2.15.0] [--out FILE]
    python benchmarks/compat.py run --env ENVIRONMENT
    python benchmarks/compat.py check [--out FILE]
    python benchmarks/compat.py table

`run` makes a virtual environment for each release in turn, in a temporary folder. It installs PyTorch, numpy and this
repository there, runs `check` in it, removes it, and merges the record into results/compat.json. Other releases keep
their record. `--env` uses an existing environment with PyTorch and setuptools, and does not change it.
`check` runs `compat_checks.py` on the installed PyTorch, and prints the record or writes it to a file.
`table` prints the records as the table of README.md. `run` and `check` exit with 1 if a row failed.

`run` and `table` need only Python.
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
# A CUDA build takes 5.5 GB, and its archives take as much again while pip unpacks them.
GIGABYTES = 12
CHECK_SECONDS = 1800

# The record of a release: `release`, `torch`, `python`, `numpy`, `date`, `cpu`, `build`, `seconds`, and `rows`, each of
# which is [check, case, whether it is right, what was seen].
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
    """Checks the releases, or the one of an existing environment; returns 1 if something failed."""
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
    """The record of one release, measured in a child process; all files that it needs are made in `folder`."""
    # Settings of the caller's environment must not change the results.
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
    with contextlib.suppress(subprocess.TimeoutExpired):  # rows that it did not reach are recorded as failed
        call(python, Path(__file__).resolve(), "check", "--out", file, timeout=CHECK_SECONDS)
    if not file.exists():
        raise ValueError("the check ended before it had a row")
    (record,) = read(file).values()
    return record


def copy_of_source(target: Path) -> Path:
    """Copies the sources of the package, since a build writes beside them."""
    target.mkdir()
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, target)
    for name in ("ortho_fx", "passes", "models"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def failures(record: Record) -> list[Sequence[Any]]:
    return [row for row in record["rows"] if not row[2]]


def merged(records: Mapping[str, Record], record: Record) -> dict[str, Record]:
    """The records with `record` added, the newest release first."""
    both = {**records, record["release"]: record}
    order = sorted(both, key=lambda release: [int(n) for n in re.findall(r"\d+", release)], reverse=True)
    return {release: both[release] for release in order}


def read(file: Path) -> dict[str, Record]:
    return json.loads(file.read_text()) if file.exists() else {}


def written(records: Mapping[str, Record]) -> str:
    """The records as JSON, with one line for each row."""
    blocks = []
    for release, record in records.items():
        head = "".join(f"  {json.dumps(k)}: {json.dumps(v)},\n" for k, v in record.items() if k != "rows")
        rows = ",\n".join(f"   {json.dumps(row)}" for row in record["rows"])
        blocks.append(f" {json.dumps(release)}: {{\n{head}" + f'  "rows": [\n{rows}\n  ]\n }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


COLUMNS = ("lowering", "values", "plain", "readme", "hook", "transforms", "export", "ddp", "warnings", "kernels")


def table(records: Mapping[str, Record]) -> str:
    """The records in Markdown, with one row for each release."""
    titles = {"plain": "values without it", "readme": "README", "ddp": "DDP"}
    head = ["PyTorch", "build", *(titles.get(column, column) for column in COLUMNS)]
    lines = [head, ["---"] * len(head)]
    for release, record in records.items():
        lines.append([release, record["build"], *(cell(record, column) for column in COLUMNS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(record: Record, check: str) -> str:
    """One check of a release: how many of its rows are right, and a summary; in bold unless all are right."""
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
