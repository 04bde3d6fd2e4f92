"""How deep a plain network still trains: no normalisation, no residuals, scikit-learn's digits, 95 % in validation.

    python benchmarks/trainable_depth.py [--only NAME ...] [--deepest 64] [--steps 1000]

Each depth is twice the one before. A depth trains if any of three learning rates of Adam brings the validation accuracy
to 95 % within the steps. A run below 50 % after half of the steps is given up, and the depths end at the second failure
in a row. Weights start at N(0, gain / fan_in), with a gain of 1 for expansions and of 2 (He) for ReLU and GELU. Writes
results/trainable_depth.json, each row as soon as it is measured; rows in that file are not measured again. Prints a
table.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import digits
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, param_groups
from ortho_fx.activations.expansion import make_activation

RESULT = Path(__file__).parent / "results" / "trainable_depth.json"
WIDTH, BATCH, LEARNING_RATES, ACCURACY = 128, 128, (2e-4, 5e-4, 1e-3), 0.95


@dataclass(frozen=True)
class Case:
    """An activation, with settings that may keep its training inside the basin."""

    activation: ExpansionConfig | Callable[[Tensor], Tensor]
    expansion_lr: float = 1.0
    gradient_clip: float | None = None

    @property
    def gain(self) -> float:
        return 1.0 if isinstance(self.activation, ExpansionConfig) else 2.0

    def make(self) -> nn.Module | Callable[[Tensor], Tensor]:
        return make_activation(self.activation) if isinstance(self.activation, ExpansionConfig) else self.activation


NETWORKS = (("hermite", 3), ("fourier", 5), ("tropical", 5), ("tropical_rational", 6))
HERMITE = ExpansionConfig("hermite", 3)
CASES = {
    **{
        f"{basis} {degree} {init}": Case(ExpansionConfig(basis, degree, init=init))
        for basis, degree in NETWORKS
        for init in ("stable", "paper")
    },
    "relu He": Case(F.relu),
    "gelu He": Case(F.gelu),
    "hermite 3 stable, gradient clipped to 1": Case(HERMITE, gradient_clip=1.0),
    "hermite 3 stable, coefficients at a tenth of the rate": Case(HERMITE, expansion_lr=0.1),
    "hermite 3 stable, coefficients fixed": Case(HERMITE, expansion_lr=0.0),
    "hermite 3 stable, clamped at 3": Case(ExpansionConfig("hermite", 3, clamp=3.0)),
}


class Layer(nn.Module):
    def __init__(self, inputs: int, case: Case, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, WIDTH)
        self.activation = case.make()
        nn.init.normal_(self.linear.weight, std=math.sqrt(case.gain / inputs), generator=generator)
        nn.init.zeros_(self.linear.bias)

    # A compiled method, so that all layers of a size share one compilation.
    @torch.compile
    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


class PlainNetwork(nn.Sequential):
    def __init__(self, case: Case, depth: int, generator: torch.Generator) -> None:
        layers = [Layer(64 if i == 0 else WIDTH, case, generator) for i in range(depth)]
        readout = nn.Linear(WIDTH, 10)
        nn.init.normal_(readout.weight, std=math.sqrt(1 / WIDTH), generator=generator)
        nn.init.zeros_(readout.bias)
        super().__init__(*layers, readout)


def train(case: Case, depth: int, lr: float, steps: int, data: tuple[Tensor, Tensor]) -> dict:
    """Best validation accuracy, and the step at which the run reached 95 %, was given up or was no longer finite."""
    images, labels = data
    held_out = 360
    generator = torch.Generator().manual_seed(0)
    model = PlainNetwork(case, depth, generator)
    groups = param_groups(model, lr=lr, expansion_lr=lr * case.expansion_lr)
    optimizer = torch.optim.Adam(groups)
    best = 0.0
    for step in range(1, steps + 1):
        batch = torch.randint(held_out, len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        if not loss.isfinite():
            return {"lr": lr, "accuracy": best, "not_finite_at_step": step}
        optimizer.zero_grad()
        loss.backward()
        if case.gradient_clip:
            nn.utils.clip_grad_norm_(model.parameters(), case.gradient_clip)
        optimizer.step()
        if step % 20 == 0:
            with torch.no_grad():
                correct = model(images[:held_out]).argmax(1) == labels[:held_out]
            best = max(best, correct.sum().item() / held_out)
            if best >= ACCURACY:
                return {"lr": lr, "accuracy": best, "reached_at_step": step}
            if best < 0.5 and step >= steps / 2:
                return {"lr": lr, "accuracy": best, "given_up_at_step": step}
    return {"lr": lr, "accuracy": best}


def climb(name: str, case: Case, deepest: int, steps: int, data: tuple[Tensor, Tensor]) -> dict:
    rungs, failures, depth = [], 0, 4
    torch.compiler.reset()
    while depth <= deepest and failures < 2:
        runs = []
        for lr in LEARNING_RATES:
            runs.append(train(case, depth, lr, steps, data))
            print(name, depth, runs[-1], flush=True)
            if "reached_at_step" in runs[-1]:
                break
        reached = "reached_at_step" in runs[-1]
        failures = 0 if reached else failures + 1
        rungs.append({"depth": depth, "trains": reached, "runs": runs})
        depth *= 2
    trained = [rung["depth"] for rung in rungs if rung["trains"]]
    return {"name": name, "deepest": max(trained, default=0), "rungs": rungs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--deepest", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    settings = {"width": WIDTH, "batch": BATCH, "deepest": arguments.deepest, "steps": arguments.steps}
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    data = digits()
    for name in arguments.only:
        if any(row["name"] == name for row in result["rows"]):
            continue
        row = climb(name, CASES[name], arguments.deepest, arguments.steps, data)
        result = {
            "date": date.today().isoformat(),
            "hardware": f"{torch.get_num_threads()} threads of a {platform.machine()} CPU",
            "torch": torch.__version__,
            **settings,
            "rows": [*result["rows"], row],
        }
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        more = " or more" if row["deepest"] == result["deepest"] else ""
        print(f"{row['name']:54} {row['deepest']}{more}")


if __name__ == "__main__":
    main()
