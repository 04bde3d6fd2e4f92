"""Reads the directory of a training run: its configuration, its rows, and its expansions before and after."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.weights.expansions import SavedExpansions, load_expansions
from ortho_fx.tensor_files import read_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The files of a run, finished or still under way.

    Attributes:
        directory: where it is.
        config: run.json: the run's settings, its hardware and its versions.
        rows: one row for each step, with "step", "loss", "lr", "gradient_norm", "seconds" and, at some steps,
            "skipped", "validation_loss", "accuracy" and "mfu".
        site_rows: one row for each site and measurement, from `SiteMonitor.measure`; none without expansions.
        coefficient_rows: one row for each site and measurement, from `SiteMonitor.coefficients`; none in runs of
            releases that did not write them.
        start, now: the expansions at the start and at the last measurement; None without expansions.
    """

    directory: Path
    config: dict[str, Any]
    rows: list[Row]
    site_rows: list[Row]
    start: SavedExpansions | None
    now: SavedExpansions | None
    coefficient_rows: list[Row] = field(default_factory=list)

    @property
    def validations(self) -> list[Row]:
        """The rows that hold a validation."""
        return [row for row in self.rows if "validation_loss" in row]


def read_run(directory: str | Path) -> Run:
    """Everything in the directory of a run.

    Raises:
        OrthoFxError: a directory without run.json or metrics.jsonl, or a file in it that cannot be read.
    """
    directory = Path(directory)
    for name in ("run.json", "metrics.jsonl"):
        if not (directory / name).is_file():
            raise OrthoFxError(f"{directory} is not a run directory: it has no {name}")
    config = read_json(directory / "run.json")
    files = [directory / name for name in ("expansions-start.safetensors", "expansions.safetensors")]
    start, now = (load_expansions(path) if path.is_file() else None for path in files)
    site_rows, coefficient_rows = (
        read_rows(directory / name) if (directory / name).is_file() else []
        for name in ("sites.jsonl", "coefficients.jsonl")
    )
    return Run(directory, config, read_rows(directory / "metrics.jsonl"), site_rows, start, now, coefficient_rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl file; a number that was not finite is NaN.

    The last row is left out if a crash or a full disk cut it short.

    Raises:
        OrthoFxError: a file that cannot be read, or a line before the last that is not a row.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise OrthoFxError(f"cannot read {path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            if any(later.strip() for later in lines[number:]):
                raise OrthoFxError(f"{path} line {number} is not a row with a step: {line[:60]!r}") from None
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


@dataclass(frozen=True)
class RowsWritten:
    """The rows of a .jsonl file up to a step: their number, and the SHA-256 of their lines in hexadecimal digits."""

    count: int
    sha256: str


def rows_differ(path: Path, expected: RowsWritten) -> str | None:
    """How the first rows of a .jsonl file differ from those that were written; None if they do not."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if len(lines) < expected.count:
        what = f"has {len(lines)} of the {expected.count} rows" if path.exists() else f"with {expected.count} rows"
        return f"{path} {what} that the run had written{'' if path.exists() else ' is missing'}"
    written = b"".join(line + b"\n" for line in lines[: expected.count])
    if hashlib.sha256(written).hexdigest() != expected.sha256:
        return f"the first {expected.count} rows of {path} have changed"
    return None


def row_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON. JSON has no NaN and no infinity: both become null, which is read as NaN."""
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    return json.dumps(finite) + "\n"
