"""The report of `ortho_fx.bench`: one measurement per candidate, and a table of them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ortho_fx.bench.config import ROW, BenchConfig
from ortho_fx.tables import table, without_empty_columns
from ortho_fx.version import __version__


@dataclass
class Measurement:
    """The measurements of one candidate.

    Args:
        name, kind: of the candidate; kind is "reference" (GELU), "floor", "expansion" or "peer".
        seconds: the median time of each phase ("forward" and "backward", or "step") and of their sum, "total".
        ratios: for the same keys, the median over the rounds of the time divided by the reference's in that round.
        ratio_of_medians, ratio_of_fastest: the ratio of the median totals, and of the shortest totals.
        floor_share: the median over the rounds of the floor's total divided by this one; 1 is as fast as a plain copy.
        rounds: the number of rounds.
        peak_bytes: the exact peak of memory in one forward and backward, or one step. It does not count memory from
            before the call: input, parameters and the gradient of the output. The output is kept until the end.
        saved_bytes: the memory still allocated between forward and backward, without the output.
        kernels: the number of generated kernels in forward and backward: launches on a GPU, C++ loop nests on a CPU.
            Matrix products and convolutions from libraries do not count.
        page_faults: the median number of minor page faults.
        compile_seconds, compile_ratio: the time that `compile_seconds` measures, and its ratio to the reference's.
        error: why a peer could not be measured.
    """

    name: str
    kind: str
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    ratio_of_medians: float | None = None
    ratio_of_fastest: float | None = None
    floor_share: float | None = None
    rounds: int = 0
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    kernels: dict[str, int] | None = None
    page_faults: float | None = None
    compile_seconds: float | None = None
    compile_ratio: float | None = None
    error: str | None = None


@dataclass
class Report:
    """Measurements under one config, the reference first.

    `print(report)` shows a table of medians and of median ratios. "fastest" is the ratio of the shortest totals, which
    other work on the machine disturbs least. If it is far from the median ratio, measure again, or use fewer threads
    than cores.
    """

    config: BenchConfig
    measurements: list[Measurement]
    environment: dict[str, Any]

    def __getitem__(self, name: str) -> Measurement:
        return next(m for m in self.measurements if m.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: date, hardware, versions, the config and the measurements."""
        config = asdict(self.config) | {"expansions": [str(expansion) for expansion in self.config.expansions]}
        return self.environment | {"config": config, "rows": [asdict(m) for m in self.measurements]}

    def __str__(self) -> str:
        return f"{self._title()}\n{table(without_empty_columns(self._rows()), 'lr')}"

    def _title(self) -> str:
        config, environment = self.config, self.environment
        shape = f", {config.elements // ROW} x {ROW}" if not config.trains else f" {config.size}, training step"
        threads = "" if environment["threads"] is None else f", {environment['threads']} threads"
        how = "eager" if config.eager else "torch.compile" + (f" {config.mode}" if config.mode != "default" else "")
        buffers = f", {environment['buffers']}" if config.device_type == "cpu" else ""
        return f"{config.what}{shape}, {config.dtype}, {how}, {environment['hardware']}{threads}{buffers}"

    def _rows(self) -> list[list[str]]:
        phases = list(self.measurements[0].seconds)
        if len(phases) == 2:  # one phase equals the total
            phases.pop()
        header = ["", *(f"{phase} ms" for phase in phases), *(f"{phase} / gelu" for phase in phases)]
        header += ["fastest / gelu", "of the floor", "peak MiB", "saved MiB", "kernels", "compile s", "compile / gelu"]
        rows = [header]
        for m in self.measurements:
            if m.error is not None:
                rows.append([m.name, f"failed: {m.error}"])
                continue
            row = [m.name, *(_number(1e3 * m.seconds[phase]) for phase in phases)]
            row += [f"{m.ratios[phase]:.2f}" for phase in phases]
            row.append("" if m.ratio_of_fastest is None else f"{m.ratio_of_fastest:.2f}")
            row.append("" if m.floor_share is None else f"{m.floor_share:.0%}")
            row += ["" if count is None else f"{count / 2**20:.1f}" for count in (m.peak_bytes, m.saved_bytes)]
            row.append("" if m.kernels is None else " + ".join(str(count) for count in m.kernels.values()))
            row.append("" if m.compile_seconds is None else f"{m.compile_seconds:.1f}")
            row.append("" if m.compile_ratio is None else f"{m.compile_ratio:.2f}")
            rows.append(row)
        return rows


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def environment_of(config: BenchConfig, buffers: str | None = None) -> dict[str, Any]:
    """The date, hardware and versions of a report."""
    versions = {"ortho_fx": __version__, "torch": torch.__version__}
    for package in ("torchortho", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    on_cpu = config.device_type == "cpu"
    return {
        "date": date.today().isoformat(),
        "hardware": _cpu_name() if on_cpu else torch.cuda.get_device_name(config.device),
        "threads": config.threads or torch.get_num_threads() if on_cpu else None,
        "buffers": buffers if on_cpu else None,
        "versions": versions,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if named:
            return named[1]
    return platform.processor() or platform.machine()
