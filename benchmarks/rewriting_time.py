"""How long `rewrite_` takes on a model of a thousand activations.

    python benchmarks/rewriting_time.py [--sites 1000]

A third of the sites are modules, a third are calls in source and a third are formulas. The first rewrite of a process
reads the sources; later ones reuse them. Measured too are a second `rewrite_`, which finds nothing to do, `revert_`,
and a deep copy of the model for comparison. Times are medians of nine. Writes results/rewriting_time.json and prints a
table.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, revert_, rewrite_

RESULT = Path(__file__).parent / "results" / "rewriting_time.json"


class Block(nn.Module):
    """A site of each kind: a module, a call and a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(16, 16), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.act(self.linear(x)))
        return x * torch.sigmoid(1.702 * x)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=1000)
    sites = parser.parse_args().sites
    torch.set_num_threads(1)
    model = nn.Sequential(*(Block() for _ in range(-(-sites // 3))))
    rows: dict[str, list[float]] = {}

    def note(name: str, call: Callable[[], object]) -> None:
        rows.setdefault(name, []).append(seconds(call))

    first = copy.deepcopy(model)
    note("the first rewrite_", lambda: rewrite_(first))
    for _ in range(9):
        for name, config in (("rewrite_", ExpansionConfig()), ('rewrite_, init="fit"', ExpansionConfig(init="fit"))):
            trial = copy.deepcopy(model)
            note(name, lambda trial=trial, config=config: rewrite_(trial, config))
        note("a second rewrite_", lambda trial=trial: rewrite_(trial))
        note("revert_", lambda trial=trial: revert_(trial))
        note("copy.deepcopy of the model", lambda: copy.deepcopy(model))
    medians = {name: statistics.median(times) for name, times in rows.items()}
    for name, median in medians.items():
        print(f"{name:28} {median:.3f} s")
    result = {
        "date": date.today().isoformat(),
        "hardware": f"one thread of a {platform.machine()} CPU",
        "torch": torch.__version__,
        "sites": 3 * len(model),
        "median_seconds": medians,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
