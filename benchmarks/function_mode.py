"""A function mode in the place of edited source: what it replaces in real models, where it is wrong, what it costs.

    OMP_NUM_THREADS=1 python benchmarks/function_mode.py [--part cases|coverage|cost] [--only PATTERN]
    # coverage needs timm and transformers: pip install -e ".[bench]"

The source front end edits the code of a module's methods. The trial here leaves code alone: while the forward of a
module (the owner) runs, a `TorchFunctionMode` answers each call of an activation by an expansion, named by the function
and by the call's number in that forward: `gelu_call_0`. It is paused inside the forward of other modules.

- cases (function_mode_cases.py): small modules of which the source front end leaves the call, or whose calls are hard
  to name. Each is compared with the same computation written out, with an expansion at each place of the text.
- coverage (function_mode_coverage.py): the models of coverage.py with calls in source. Both ways put the same function
  in the place of each call. Every site of the source front end is looked for among the calls that the mode gets, and
  the outputs are compared bit by bit. Runs: eval, train, half the sequence, and one token more with a cache.
- cost: a block of GPT-2 with `F.gelu`, a Hermite expansion put there in both ways; medians of calls in turns.

The decision that this carries is in passes/source/README.md. Writes results/function_mode.json, five minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from function_mode_calls import answer_by
from function_mode_cases import CASES, measure_case
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, HermiteActivation, rewrite_, torch_private
from ortho_fx.operators.generated_code import count_kernels, generated_code

RESULT = Path(__file__).parent / "results" / "function_mode.json"


class Block(nn.Module):
    """A block of GPT-2 with its activation called as a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, -1, 16).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def cost() -> list[dict[str, Any]]:
    rows = []
    for width, length, calls in ((32, 8, 2000), (256, 128, 300)):
        torch.manual_seed(0)
        blocks = {way: Block(width) for way in ("source", "mode")}
        rewrite_(blocks["source"], ExpansionConfig("hermite", 3))
        answer_by(blocks["mode"], {"gelu_call_0": HermiteActivation(degree=3)})
        x = torch.randn(2, length, width)
        eager = medians(blocks, x, calls)
        row: dict[str, Any] = {"width": width, "tokens": 2 * length, "eager_microseconds": eager}
        compiled, row["compile_seconds"], row["kernels"] = {}, defaultdict(list), {}
        for _ in range(3):
            for way, block in blocks.items():
                torch.compiler.reset()
                with generated_code() as codes, torch_private.load(torch_private.TOOLS).fresh_cache():
                    start = time.perf_counter()
                    compiled[way] = torch.compile(block, fullgraph=True)
                    compiled[way](x).sum().backward()
                    row["compile_seconds"][way].append(round(time.perf_counter() - start, 2))
                row["kernels"][way] = count_kernels(codes)
        row["compile_seconds"] = {way: statistics.median(times) for way, times in row["compile_seconds"].items()}
        print(json.dumps(row))
        rows.append(row)
    return rows


def medians(ways: dict[str, nn.Module], x: Tensor, calls: int) -> dict[str, float]:
    times = defaultdict(list)
    with torch.no_grad():
        for turn in range(calls + calls // 10):
            for way, model in ways.items():
                start = time.perf_counter()
                model(x)
                if turn >= calls // 10:
                    times[way].append(time.perf_counter() - start)
    return {way: round(1e6 * statistics.median(values), 1) for way, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("cases", "coverage", "cost"))
    parser.add_argument("--only", default="*", metavar="PATTERN", help="models of the coverage, such as 'mamba*'")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result |= {"date": date.today().isoformat(), "hardware": f"one thread of a {platform.machine()} CPU"}
    result |= {"torch": torch.__version__}
    if arguments.part in (None, "cases"):
        result["cases"] = {cls.__name__: measure_case(cls) for cls in CASES}
        print(json.dumps(result["cases"], indent=1))
    if arguments.part in (None, "cost"):
        result["cost"] = cost()
    if arguments.part in (None, "coverage"):
        from function_mode_coverage import coverage

        result["coverage"] = coverage(arguments.only)
    if arguments.only == "*":
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
