"""The checks of `compat.py check`: they test the promises of ortho_fx on the installed PyTorch.

A check is a function that yields its cases with their names. A case is a call: it returns what it saw, or raises an
error if that is wrong; the next cases run nevertheless. Only PyTorch, numpy and ortho_fx are needed.

- lowering: Inductor uses our own kernels for each basis, not the fallback;
- values, plain: compiled expansions in float32 agree with eager float64, forward and backward, with the lowering
  (values) and without it (plain);
- kernels: the number of kernels that Inductor makes of a single expansion, forward and backward, with the lowering and
  without it. The lowering must not need more;
- readme: the Python blocks of README.md run in order;
- hook: a model under `torch.compile(model, backend="ortho_fx")` trains like a model after `rewrite_`;
- transforms: results of torch.func, eager and compiled, agree with those of the formulas in float64;
- export: `torch.export`, strict and not strict, for a batch of any size, and its decompositions;
- ddp: a step of two processes agrees with the step of one;
- warnings: the warnings of ortho_fx in all of these checks.
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
    """The record of the installed PyTorch; written to a file after each check, in case the process is killed."""
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
    """The case, whether it is right, and what was seen. `noted` gets our warnings, each with its first case."""
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
    """The device for which PyTorch was built; the checks run on the CPU in any case."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def readme() -> Iterator[Case]:
    namespace: dict[str, Any] = {"__name__": "readme"}

    def block(number: int, text: str) -> str:
        # The block is a file, since the rewrite reads the source of classes from their files.
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
