"""How fast and how large expansions are beside F.gelu: alone, in an MLP block, in training steps, and to compile.

    python benchmarks/speed.py [--only SECTION ...] [--quick]    # torchortho too, with pip install -e ".[bench]"

Sections: the activation alone in three dtypes, with fresh allocations (CPU), without torch.compile, with an expansion
for each channel, and of the bases that are not from the paper; an MLP block; training steps of GPT-2 and ConvNeXt; the
compilation of twelve blocks. ortho_fx/bench/measure.py describes the measurements; `ortho-fx bench` measures any of
them under other settings. Runs on a GPU if there is one, with GPT-2 124M and ConvNeXt-T under autocast to bfloat16;
`--device cpu` uses the CPU.

Prints a table for each section. Writes results/speed_cpu.json or results/speed_<GPU>.json, with date, hardware and
versions for each section. `--only` measures some sections anew and keeps the others in that file; `--quick` tries
everything out in small and writes nothing. `--check` writes nothing either: it measures, and prints which ratios and
kernel counts are worse than those in the file.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch

from ortho_fx import ExpansionConfig
from ortho_fx.bench.config import DEFAULT_EXPANSIONS, ROW, BenchConfig
from ortho_fx.bench.measure import bench, compile_times
from ortho_fx.bench.report import environment_of
from ortho_fx.tables import table

RESULTS = Path(__file__).parent / "results"
HERMITE, TROPICAL, RATIONAL, FOURIER, TIED = (
    ExpansionConfig("hermite"),
    ExpansionConfig("tropical"),
    ExpansionConfig("tropical_rational"),
    ExpansionConfig("fourier"),
    ExpansionConfig("fourier", tied=True),
)
FEW = (HERMITE, RATIONAL, FOURIER)
FEW_WAVES = (ExpansionConfig("fourier", 1), ExpansionConfig("fourier", 2))
A_CHANNEL = tuple(
    ExpansionConfig(basis, granularity=granularity)
    for basis in ("hermite", "tropical", "fourier")
    for granularity in ("layer", "channel", "group:8")
)
# Those that do not come from the paper.
FURTHER = tuple(
    ExpansionConfig(basis, granularity=granularity)
    for basis in ("chebyshev", "safe_rational", "piecewise_power", "gelu_series", "silu_series", "relu_squared_series")
    for granularity in ("layer", "channel")
)


def sections(device: str) -> dict[str, dict[str, Any]]:
    """The settings of every section, in order. "fresh" runs first: a process that reuses buffers cannot go back."""
    gpu = device != "cpu"
    # On a GPU an output must not fit into the L2 cache.
    elements = (16384 if gpu else 4096) * ROW
    alone: dict[str, Any] = {"device": device, "elements": elements, "peers": False, "rounds": 50 if gpu else 15}
    model = {**alone, "expansions": FEW, "rounds": 20 if gpu else 8, "dtype": "bfloat16" if gpu else "float32"}
    step = {**model, "expansions": (HERMITE, TROPICAL, RATIONAL, FOURIER), "peers": True}
    every = {
        "fresh": {**alone, "fresh": True, "expansions": (HERMITE, TROPICAL, RATIONAL, FOURIER)},
        "float32": {**alone, "peers": True, "expansions": (*DEFAULT_EXPANSIONS, *FEW_WAVES, TIED)},
        "bfloat16": {**alone, "dtype": "bfloat16", "peers": gpu},
        "float16": {**alone, "dtype": "float16", "expansions": FEW},
        "eager": {**alone, "eager": True, "expansions": (HERMITE,)},
        "channel": {**alone, "expansions": A_CHANNEL},
        "bases": {**alone, "expansions": FURTHER},
        "mlp": {**model, "what": "mlp", "elements": (8192 if gpu else 1024) * ROW},
        "gpt2": {**step, "what": "gpt2", "size": "124m" if gpu else "tiny"},
        "convnext": {**step, "what": "convnext", "size": "t" if gpu else "tiny"},
        "compile": alone,
    }
    if gpu:
        del every["fresh"]
    return every


def quick(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings with small sizes."""
    small = {"elements": 64 * ROW, "rounds": 2, "peers": False, "size": "tiny", "batch_size": 2}
    return {**settings, **small, "expansions": settings.get("expansions", FEW)[:1]}


def compilation(config: BenchConfig, blocks: int) -> dict[str, Any]:
    """Prints and returns how long a model of `blocks` blocks takes to compile with cold caches."""
    seconds = compile_times(config, blocks)
    ratios = {name: value / seconds["gelu"] for name, value in seconds.items()}
    print(f"compilation of {blocks} MLP blocks, forward and backward, cold caches")
    rows = [[name, f"{seconds[name]:.1f}", f"{ratios[name]:.2f}"] for name in seconds]
    print(table([["", "s", "/ gelu"], *rows], "lr"))
    return environment_of(config) | {"blocks": blocks, "seconds": seconds, "ratios": ratios}


# A median of these rounds varies by less.
_WORSE = 1.1


def worse(section: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each ratio to GELU that rose by more than a tenth, and each number of kernels that rose."""
    lines = []
    if section == "compile":
        pairs = [(name, before["ratios"].get(name), ratio) for name, ratio in after["ratios"].items()]
    else:
        known = {row["name"]: row for row in before["rows"]}
        rows = [row for row in after["rows"] if row["kind"] == "expansion" and row["name"] in known]
        pairs = [(row["name"], known[row["name"]]["ratios"]["total"], row["ratios"]["total"]) for row in rows]
        for row in rows:
            for way, count in (row["kernels"] or {}).items():
                if count > (had := (known[row["name"]]["kernels"] or {}).get(way, count)):
                    lines.append(f"{section}: {row['name']} has {count} kernels {way}, {had} before")
    for name, had, ratio in pairs:
        if had and ratio > had * _WORSE:
            lines.append(f"{section}: {name} takes {ratio:.2f} of GELU's time, {had:.2f} before")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help=", ".join(sections("cpu")))
    parser.add_argument("--quick", action="store_true", help="everything in small, to see that it works")
    parser.add_argument("--check", action="store_true", help="print what is worse than in the file, and write nothing")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: all)")
    options = parser.parse_args()
    chosen = sections(options.device)
    unknown = [name for name in options.only or () if name not in chosen]
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; sections are {', '.join(chosen)}")

    gpu = options.device != "cpu"
    name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(options.device).lower()) if gpu else "cpu"
    path = RESULTS / f"speed_{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    results: dict[str, Any] = dict(kept) if options.only else {}
    lines: list[str] = []
    for section, settings in chosen.items():
        if options.only and section not in options.only:
            continue
        start = time.perf_counter()
        print(f"## {section}", flush=True)
        config = BenchConfig(**(quick(settings) if options.quick else settings), threads=options.threads)
        if section == "compile":
            results[section] = compilation(config, 2 if options.quick else 12)
        else:
            report = bench(config)
            print(report)
            results[section] = report.to_dict()
        print(f"{time.perf_counter() - start:.0f} s\n", flush=True)
        if section in kept and options.check and not options.quick:
            lines += worse(section, kept[section], results[section])
        if not options.quick and not options.check:
            path.write_text(json.dumps(results, indent=1) + "\n")
    if options.check:
        print("\n".join(lines) or "nothing is worse")


if __name__ == "__main__":
    main()
