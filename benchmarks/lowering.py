"""The lowering of ortho_fx beside plain tensor operations, which take over where it cannot be used.

    python benchmarks/lowering.py [--quick]

Measures single activations, forward and backward, compared with compiled F.gelu, as `ortho-fx bench` does: first with
the lowering, then without it, in one process. Prints a table. Writes the numbers with date and hardware to
results/lowering_cpu.json (or results/lowering_<GPU>.json) under the installed release of PyTorch; other releases keep
their numbers. `plain / own` is the factor that a user of an unknown release may lose; the warning in
ortho_fx/torch_private.py names the largest one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from ortho_fx import ExpansionConfig
from ortho_fx.bench.config import ROW, BenchConfig
from ortho_fx.bench.measure import bench
from ortho_fx.bench.report import Report
from ortho_fx.operators import support
from ortho_fx.tables import table

RESULTS = Path(__file__).parent / "results"
EXPANSIONS = tuple(
    ExpansionConfig(basis, degree, granularity=granularity)
    for basis, degree in (("hermite", 3), ("hermite", 16), ("fourier", 3), ("tropical", 5), ("tropical_rational", 5))
    for granularity in ("layer", "channel")
)


def measure(device: str, quick: bool) -> dict[str, Any]:
    """Time ratios and numbers of kernels for both forms, and how much longer plain operations take."""
    elements, rounds = (64, 2) if quick else (16384 if device == "cuda" else 2048, 15)
    config = BenchConfig(device=device, elements=elements * ROW, rounds=rounds, peers=False, expansions=EXPANSIONS)
    reports: dict[str, Report] = {}
    for form, chosen in (("own", contextlib.nullcontext()), ("plain", support.without_lowering())):
        with chosen:
            reports[form] = bench(config)
    rows = {}
    for expansion in map(str, EXPANSIONS):
        own, plain = (reports[form][expansion] for form in ("own", "plain"))
        rows[expansion] = {
            "own": round(own.ratios["total"], 3),
            "plain": round(plain.ratios["total"], 3),
            "plain / own": round(plain.ratios["total"] / own.ratios["total"], 3),
            "kernels own": own.kernels,
            "kernels plain": plain.kernels,
        }
    return {**reports["own"].environment, "elements": config.elements, "dtype": config.dtype, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="in small, to see that it works; writes nothing")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = measure(device, options.quick)
    columns = ("own", "plain", "plain / own")
    print(f"forward and backward beside compiled gelu, PyTorch {torch.__version__}, {result['hardware']}")
    rows = [[name, *(f"{row[c]:.2f}" for c in columns)] for name, row in result["rows"].items()]
    print(table([["", *columns], *rows], "lr"))
    if not options.quick:
        name = re.sub(r"[^a-z0-9]+", "_", result["hardware"].lower()) if device == "cuda" else "cpu"
        path = RESULTS / f"lowering_{name}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        results[torch.__version__.split("+")[0]] = result
        path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
