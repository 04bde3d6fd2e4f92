"""Trained ReLU networks become polynomials of degree 2 and 3: replaced at once, and annealed, with the same training.

    python benchmarks/anneal.py [--depth 12] [--steps 500] [--fine-tune 150] [--seeds 6]

A plain network of width 64, without normalisation or residuals, learns 1,000 of scikit-learn's digits; accuracy is on
the other 797. Its ReLUs are replaced by polynomials that are fitted under the inputs that they get. Then it is
fine-tuned. The polynomials are in place from the start, or annealed over the first three tenths of the steps; each with
and without the penalty on inputs beyond three deviations. Batches, learning rates and number of steps are the same. A
run whose loss is no longer finite is lost and has the accuracy of guessing. Writes results/anneal.json and prints a
table.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import digits
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, param_groups, rewrite_
from ortho_fx.rewriting.anneal import Annealing

RESULT = Path(__file__).parent / "results" / "anneal.json"
WIDTH, HELD_OUT, BATCH, MEASURED = 64, 797, 64, 500
LEARNING_RATE, FINE_TUNING_RATE, WEIGHT_DECAY, PENALTY, SHARE = 2e-3, 1e-3, 1e-2, 0.1, 0.3
DEGREES = (2, 3)


def network(depth: int, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(64 if i == 0 else WIDTH, WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(module.bias)
    return model


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    images, labels = data
    model.eval()
    with torch.no_grad():
        correct = model(images[:HELD_OUT]).argmax(1) == labels[:HELD_OUT]
    model.train()
    return correct.double().mean().item()


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    annealing: Annealing | None = None,
    penalty: float = 0.0,
) -> float:
    """Accuracy after the steps, or that of guessing if the loss or a weight is not finite."""
    images, labels = data
    groups = param_groups(model, lr=lr, weight_decay=WEIGHT_DECAY)
    rates = [group["lr"] for group in groups]
    weights, expansions = (
        [parameter for group in groups if (group["name"] == "expansions") == own for parameter in group["params"]]
        for own in (False, True)
    )
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        scale = min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        batch = torch.randint(HELD_OUT, len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        if annealing is not None and penalty:
            loss = loss + penalty * annealing.penalty()
        if not loss.isfinite():
            return 0.1
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        if expansions:
            nn.utils.clip_grad_norm_(expansions, 1.0)
        optimizer.step()
        if annealing is not None:
            annealing.step()
    if annealing is not None:
        annealing.finish()
    finite = all(parameter.isfinite().all() for parameter in model.parameters())
    return accuracy(model, data) if finite else 0.1


def compare(trained: nn.Module, data: tuple[Tensor, Tensor], steps: int, seed: int) -> dict[str, float]:
    batch = data[0][HELD_OUT : HELD_OUT + MEASURED]
    settings = {"steps": steps, "lr": FINE_TUNING_RATE, "seed": 1000 + seed}
    row = {
        "relu": accuracy(trained, data),
        "relu, fine-tuned": train(copy.deepcopy(trained), data, **settings),
    }
    for degree in DEGREES:
        model = copy.deepcopy(trained)
        rewrite_(model, ExpansionConfig("hermite", degree, "fit"), example_inputs=batch)
        row[f"degree {degree}, replaced"] = accuracy(model, data)
        row[f"degree {degree}, replaced and fine-tuned"] = train(model, data, **settings)
        # Annealing in a single step is a replacement, so all variants share this code.
        for name, taken, penalty in (
            ("replaced and fine-tuned with penalty", 1, PENALTY),
            ("annealed", round(SHARE * steps), 0.0),
            ("annealed with penalty", round(SHARE * steps), PENALTY),
        ):
            model = copy.deepcopy(trained)
            annealing = Annealing(model, degree=degree, batches=[batch], steps=taken)
            if taken == 1:
                annealing.step()
            row[f"degree {degree}, {name}"] = train(model, data, annealing=annealing, penalty=penalty, **settings)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--fine-tune", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, start = digits(), time.perf_counter()
    runs: list[dict] = []
    for seed in range(arguments.seeds):
        trained = network(arguments.depth, seed)
        train(trained, data, steps=arguments.steps, lr=LEARNING_RATE, seed=seed)
        runs.append({"seed": seed, **compare(trained, data, arguments.fine_tune, seed)})
        print(f"seed {seed} after {time.perf_counter() - start:.0f} s", flush=True)
    names = [name for name in runs[0] if name != "seed"]
    table = {}
    for name in names:
        values = [run[name] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        table[name] = {"mean": statistics.fmean(values), "std": deviation, "lost": values.count(0.1)}
        print(
            f"{name:48} {table[name]['mean']:.4f} +- {deviation:.4f}" + f"  {values.count(0.1)} lost" * (0.1 in values)
        )
    result = {
        "date": date.today().isoformat(),
        "hardware": f"{torch.get_num_threads()} threads of a {platform.machine()} CPU",
        "torch": torch.__version__,
        "learning_rate": LEARNING_RATE,
        "fine_tuning_rate": FINE_TUNING_RATE,
        "penalty": PENALTY,
        "annealed_share_of_steps": SHARE,
        **vars(arguments),
        "seconds": time.perf_counter() - start,
        "runs": runs,
        "accuracy": table,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
