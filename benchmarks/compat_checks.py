"""The checks of `compat.py check`: what ortho_fx promises, tried on the PyTorch that is installed.

A check is a function that gives its cases by name. A case is a call: it returns what it saw, and raises where that is
wrong. The cases that remain go on. Nothing but PyTorch, numpy and ortho_fx is needed.

- lowering: Inductor gets our own kernels for each basis, not the fallback;
- values, plain: compiled expansions in float32, forward and backward, are those of eager float64: with the lowering
  and without it;
- kernels: how many Inductor makes of an expansion alone, forward and backward, with the lowering and without it. The
  lowering must not take more;
- readme: the Python of README.md, in order;
- hook: `torch.compile(model, backend="ortho_fx")` trains as a model does that `rewrite_` has been over;
- transforms: those of torch.func, eager and compiled, are those of the formulas in float64;
- export: `torch.export`, strict and not, for a batch of any size, and its decompositions;
- ddp: a step of two processes is that of one;
- warnings: what ortho_fx warned of in all of these.
"""

from __future__ import annotations

import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compat import ROOT, Record, written
from compat_case import Case, Wrong
from compat_expansions import kernels, lowering, plain, values
from compat_models import ddp, export, hook
from compat_transforms import transforms


def check(out: Path | None = None) -> Record:
    """The record of the installed PyTorch; also written to a file after each check, for a process that does not end."""
    start = time.perf_counter()
    record: Record = {
        "release": torch.__version__.split("+")[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "build": build(),
    }
    noted: dict[str, str] = {}
    checks = {**CHECKS, "warnings": partial(warned, noted)}
    waiting = [[name, "all", False, "not reached: the process ended before"] for name in checks]
    done: list[list[Any]] = []
    for name, cases in checks.items():
        done += [[name, *row(name, case, call, noted)] for case, call in cases()]
        waiting = waiting[1:]
        record |= {"seconds": round(time.perf_counter() - start), "rows": [*done, *waiting]}
        if out is not None:
            out.write_text(written({record["release"]: record}))
    return record


def row(name: str, case: str, call: Callable[[], Any], noted: dict[str, str]) -> tuple[str, bool, Any]:
    """Case, whether it is right, and what was seen; warnings of ours are noted with the first case that met them."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            right, seen = True, call()
        except Wrong as wrong:
            right, seen = False, str(wrong)
        except Exception as error:
            text = re.sub(r"\s+", " ", str(error)).strip()
            right, seen = False, f"{type(error).__name__}: {text[:400]}"
    for warning in caught:
        if "ortho_fx" in str(warning.message):
            noted.setdefault(str(warning.message), case)
    outcome = "ok" if right else "FAILED"
    print(f"{time.perf_counter() - start:5.1f} s  {outcome}  {name}, {case}: {seen}", file=sys.stderr, flush=True)
    return case, right, seen


def cpu_name() -> str:
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def build() -> str:
    """What PyTorch was built for; everything here runs on the CPU."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def readme() -> Iterator[Case]:
    namespace: dict[str, Any] = {"__name__": "readme"}

    def block(number: int, text: str) -> str:
        # Classes are rewritten by their source, which a file has.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"block{number}.py"
            file.write_text(text)
            exec(compile(text, str(file), "exec"), namespace)
        return "ran"

    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    for number, text in enumerate(blocks, start=1):
        yield f"block {number}", partial(block, number, text)


def warned(noted: dict[str, str]) -> Iterator[Case]:
    def none() -> str:
        return "none"

    def text(message: str) -> None:
        raise Wrong(message)

    for message, case in noted.items():
        yield case, partial(text, message)
    if not noted:
        yield "all", none


CHECKS: dict[str, Callable[[], Iterator[Case]]] = {
    "lowering": lowering,
    "values": values,
    "plain": plain,
    "kernels": kernels,
    "readme": readme,
    "hook": hook,
    "transforms": transforms,
    "export": export,
    "ddp": ddp,
}
