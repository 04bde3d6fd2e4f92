"""Collects the code that Inductor generates, and counts its kernels."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from ortho_fx import torch_private


@contextlib.contextmanager
def generated_code() -> Iterator[list[str]]:
    """Collects the code of every graph that Inductor compiles, or finds in its caches, inside the block."""
    lowering = torch_private.load(torch_private.TOOLS).GraphLowering
    codes: list[str] = []
    before = lowering.save_output_code
    lowering.save_output_code = codes.append
    try:
        yield codes
    finally:
        lowering.save_output_code = before


def count_kernels(codes: Sequence[str]) -> dict[str, int]:
    """The number of kernels (Triton launches and outer C++ loops) in generated forward and backward graphs."""
    counts = {"forward": 0, "backward": 0}
    for code in codes:
        phase = "backward" if re.search(r"\btangents_\d", code) else "forward"
        triton = re.findall(r"^(\w+) = async_compile\.triton\(", code, re.MULTILINE)
        counts[phase] += sum(len(re.findall(rf"\b{name}\.run\(", code)) for name in triton)
        counts[phase] += len(re.findall(r"for ?\(int64_t x0=", code))
    return counts
