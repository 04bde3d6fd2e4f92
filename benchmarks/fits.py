"""Fits of known activations, compared with those of torchortho: how close they are, and how long they take.

    OMP_NUM_THREADS=1 python benchmarks/fits.py          # needs torchortho: pip install -e ".[bench]"

torchortho does not state the interval of its fits, so both are measured under the same three weights: uniform on
[-3, 3] and on [-5, 5], and N(0, 1). Ours is fitted under the weight with which it is measured, once in value alone and
once in value and derivative alike (derivative_weight 1). A fit is judged by the cost that it minimises: the rmse of the
value, or the root of the sum of both squares. Times are medians of nine. Writes results/fits.json and prints a table.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
import torchortho
from torch import nn

from ortho_fx import ExpansionConfig, fit

RESULT = Path(__file__).parent / "results" / "fits.json"
PEERS = {
    ("hermite", 3): torchortho.HermiteActivation,
    ("fourier", 6): torchortho.FourierActivation,
    ("tropical_rational", 6): torchortho.TropicalRationalActivation,
}
FUNCTIONS = {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}
WEIGHTS = {
    "uniform on [-3, 3]": {"weight": "uniform", "interval": (-3.0, 3.0)},
    "uniform on [-5, 5]": {"weight": "uniform", "interval": (-5.0, 5.0)},
    "N(0, 1)": {},
}


def errors(function, reference, options: dict) -> dict[str, float]:
    """Root mean square and largest error of value and derivative, by the midpoint rule on 200,000 points."""
    low, high = options.get("interval", (-8.0, 8.0))
    x = low + (torch.arange(200_000) + 0.5) * ((high - low) / 200_000)
    weight = torch.ones_like(x) if "interval" in options else torch.exp(-x * x / 2)
    x.requires_grad_()
    measured = []
    for call in (function, reference):
        y = call(x)
        measured.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    shown = x.detach().abs() <= 5
    result = {}
    for name, a, b in zip(("value", "derivative"), *measured, strict=True):
        error = (a - b).double()
        result[f"{name}_rmse"] = math.sqrt(float((weight * error**2).sum() / weight.sum()))
        result[f"{name}_max"] = float(error[shown].abs().max())
    return result


def cost(measured: dict[str, float], derivative_weight: float) -> float:
    """The root of what a fit with this weight minimises."""
    return math.hypot(measured["value_rmse"], math.sqrt(derivative_weight) * measured["derivative_rmse"])


def timed(call):
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for (basis, degree), peer in PEERS.items():
        for name, function in FUNCTIONS.items():
            torch.manual_seed(0)
            theirs, seconds = timed(lambda peer=peer, f=function, n=degree: peer(n, act_init=f, load_cached=False))
            for (weight, options), derivative_weight in itertools.product(WEIGHTS.items(), (0.0, 1.0)):
                config = ExpansionConfig(basis, degree)
                settings = {**options, "derivative_weight": derivative_weight}
                fit(function, config, **settings)
                runs = [timed(lambda f=function, c=config, s=settings: fit(f, c, **s)) for _ in range(9)]
                row = {
                    "function": name,
                    "expansion": str(config),
                    "weight": weight,
                    "derivative_weight": derivative_weight,
                    "seconds": statistics.median(t for _, t in runs),
                    "torchortho_seconds": seconds,
                    "errors": errors(runs[0][0].activation(), function, options),
                    "torchortho_errors": errors(theirs, function, options),
                }
                ours, others = row["errors"], row["torchortho_errors"]
                row |= {"cost": cost(ours, derivative_weight), "torchortho_cost": cost(others, derivative_weight)}
                rows.append(row)
                print(
                    f"{name:5} {row['expansion']:20} {weight:19} {derivative_weight:.0f} "
                    f"{row['cost']:.2g} ({row['torchortho_cost']:.2g})  "
                    f"{1e3 * row['seconds']:6.1f} ms beside {seconds:5.1f} s  "
                    + "  ".join(f"{key} {ours[key]:.2g} ({others[key]:.2g})" for key in ours),
                    flush=True,
                )
    result = {
        "date": date.today().isoformat(),
        "hardware": f"one thread of a {platform.machine()} CPU",
        "torch": torch.__version__,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
