"""A ConvNeXt trained on clothes learns digits: with its GELU, or with fits of GELU that learn too.

    python benchmarks/transfer.py pretrain [--data /usr/share/datasets/fashion-mnist]
    python benchmarks/transfer.py run [--steps 400] [--seeds 5] [--processes 1]

`pretrain` trains a ConvNeXt with 55,000 parameters on Fashion-MNIST, and writes transfer_pretrained.safetensors beside
this file. `run` fine-tunes it, with a new head, on scikit-learn's digits, enlarged from 8 to 16 pixels a side. A seed
decides the head, the order of the images and their shifts; all activations share them. Runs are at equal steps and at
equal time: the time of a compiled step is measured in turns in this process, and a slower one gets fewer steps. Writes
results/transfer.json and results/transfer.png; the table is in docs/guides/fine_tune.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, param_groups, rewrite_
from ortho_fx.models.compare.costs import equal_time_steps
from ortho_fx.models.convnext import ConvNeXt, ConvNeXtConfig
from ortho_fx.models.data.batch import Data
from ortho_fx.models.data.images import IDX, Digits, Settings
from ortho_fx.models.data.loader import load_validation
from ortho_fx.models.training.optimization import learning_rate_scale
from ortho_fx.models.weights.bundle import load_model, save_weights
from ortho_fx.plots import line_styles, load_pyplot, save

HERE = Path(__file__).parent
WEIGHTS, RESULT, PICTURE = (
    HERE / "transfer_pretrained.safetensors",
    HERE / "results" / "transfer.json",
    HERE / "results" / "transfer.png",
)
SHAPE = ConvNeXtConfig(channels=1, classes=10, patch=2, depths=(2, 2), widths=(24, 48), layer_scale=1.0)
SIDE = 16
CONFIGS: dict[str, ExpansionConfig | None] = {
    "gelu": None,
    "hermite 5": ExpansionConfig("hermite", 5, "fit"),
    "fourier 6": ExpansionConfig("fourier", 6, "fit"),
    "tropical_rational 6": ExpansionConfig("tropical_rational", 6, "fit"),
}
BATCH, LEARNING_RATE, WARMUP, EVERY, ROUNDS = 32, 1e-3, 10, 10, 30
# At the learning rate of the weights, a fit would hardly move in so few steps.
EXPANSION_LEARNING_RATE = 10 * LEARNING_RATE


def pretrain(folder: str, steps: int) -> None:
    torch.manual_seed(0)
    data, model = IDX(folder, Settings(augment="flip")), ConvNeXt(SHAPE)
    optimizer = torch.optim.AdamW(param_groups(model, lr=4e-3, weight_decay=0.05), fused=True)
    compiled = torch.compile(loss)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * learning_rate_scale(step, steps, 100)
        take_step(compiled, model, optimizer, data.batch(0, step, 64))
    validation, accuracy = validate(model, data)
    print(f"{steps} steps on Fashion-MNIST: validation loss {validation:.4f}, accuracy {accuracy:.1%}")
    about = {"data": "Fashion-MNIST", "steps": steps, "validation_loss": validation, "accuracy": accuracy}
    save_weights(model, WEIGHTS, about)
    print(WEIGHTS, WEIGHTS.stat().st_size, "bytes")


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def enlarged(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    images, labels = batch
    if images.shape[-1] < SIDE:
        images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear")
    return images, labels


@torch.no_grad()
def validate(model: nn.Module, data: Data) -> tuple[float, float]:
    """The loss and the accuracy over all validation images."""
    model.eval()
    total = right = count = 0.0
    for batch in load_validation(data, size=256):
        images, labels = enlarged(batch)
        logits = model(images)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(1) == labels).sum().item()
        count += (labels >= 0).sum().item()
    model.train()
    return total / count, right / count


def take_step(
    compiled: Callable[..., Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> float:
    value = compiled(model, *batch)
    optimizer.zero_grad()
    value.backward()
    # Clipped together with the weights, a large gradient of a coefficient would scale theirs down.
    for own in (False, True):
        groups = [group for group in optimizer.param_groups if (group["name"] == "expansions") == own]
        nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], 1.0)
    optimizer.step()
    return value.item()


def start(name: str, data: Data, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The pretrained network with a new head, rewritten for the images of the new data, and its optimizer."""
    model, config = load_model(WEIGHTS), CONFIGS[name]
    torch.manual_seed(seed)
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)
    if config is not None:
        # The new head does not matter here: it comes after all activations.
        rewrite_(model, config, example_inputs=enlarged(data.batch(10**6, 0, 256))[0])
    groups = param_groups(model, lr=LEARNING_RATE, weight_decay=0.05, expansion_lr=EXPANSION_LEARNING_RATE)
    return model, torch.optim.AdamW(groups, fused=True)


def fine_tune(name: str, seed: int, steps: int) -> dict[str, Any]:
    """The validation loss and accuracy before, at every `EVERY` steps, and after; without a compiler."""
    torch.set_num_threads(1)
    began, data = time.process_time(), Digits()
    model, optimizer = start(name, data, seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses, accuracies = {}, {}
    losses[0], accuracies[0] = validate(model, data)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate_scale(step, steps, WARMUP)
        take_step(loss, model, optimizer, enlarged(data.batch(seed, step, BATCH)))
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            losses[step + 1], accuracies[step + 1] = validate(model, data)
    own = {"activation": name, "seed": seed, "steps": steps, "cpu_seconds": round(time.process_time() - began, 1)}
    return {**own, "losses": losses, "accuracies": accuracies}


def measure_ratios(data: Data) -> dict[str, float]:
    """The processor time of a compiled training step divided by GELU's: the median over rounds of taking turns."""
    parts: dict[str, tuple[Callable[..., Tensor], nn.Module, torch.optim.Optimizer]] = {}
    for name in CONFIGS:
        parts[name] = (torch.compile(loss, dynamic=False), *start(name, data, 0))
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(ROUNDS + 3):
        batch = enlarged(data.batch(0, number, BATCH))
        for name, part in parts.items():
            begun = time.process_time()
            take_step(*part, batch)
            if number >= 3:  # the first ones compile
                times[name].append(time.process_time() - begun)
    return {
        name: statistics.median(mine / gelu for mine, gelu in zip(own, times["gelu"], strict=True))
        for name, own in times.items()
    }


def run(steps: int, seeds: int, processes: int) -> None:
    ratios = measure_ratios(Digits())
    print("time of a step / GELU's:", {name: round(ratio, 3) for name, ratio in ratios.items()}, flush=True)
    wanted = [
        (name, seed, number)
        for seed in range(seeds)
        for name, ratio in ratios.items()
        for number in dict.fromkeys([steps, equal_time_steps(steps, ratio)])
    ]
    runs: list[dict[str, Any]] = []
    with ProcessPoolExecutor(processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(fine_tune, *zip(*wanted, strict=True)):
            runs.append(row)
            print(f"seed {row['seed']} {row['activation']:20} {row['steps']} steps: {row['losses'][row['steps']]:.4f}")
    result = {
        "date": date.today().isoformat(),
        "hardware": f"1 thread of a {platform.machine()} CPU",
        "torch": torch.__version__,
        "cpu_minutes": round(sum(row["cpu_seconds"] for row in runs) / 60, 1),
        "steps": steps,
        "seeds": seeds,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "expansion_learning_rate": EXPANSION_LEARNING_RATE,
        "step_time_ratios": ratios,
        "runs": runs,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    draw(json.loads(RESULT.read_text()), PICTURE)
    print(RESULT)


def draw(result: dict[str, Any], path: Path) -> None:
    """The validation loss over the steps: a line for the mean over seeds, a band from the lowest to the highest."""
    figure, axis = load_pyplot().subplots(figsize=(7, 3.8), layout="constrained")
    names = list(result["step_time_ratios"])
    for name, style in zip(names, line_styles(names), strict=True):
        wanted = (name, result["steps"])
        curves = [run["losses"] for run in result["runs"] if (run["activation"], run["steps"]) == wanted]
        steps = [int(step) for step in curves[0]][1:]
        values = torch.tensor([[curve[str(step)] for step in steps] for curve in curves])
        axis.plot(steps, values.mean(0), lw=1.5, label=name, **style)
        axis.fill_between(steps, values.amin(0), values.amax(0), color=style["color"], alpha=0.12, lw=0)
    axis.set_xlabel("step of fine-tuning")
    axis.set_ylabel("validation loss, nats")
    axis.set_title(
        f"digits, from a ConvNeXt trained on clothes: mean and range of {result['seeds']} seeds", fontsize=10
    )
    axis.grid(alpha=0.2, which="both")
    axis.margins(x=0)
    axis.legend(frameon=False, fontsize=9)
    save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("pretrain")
    first.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    first.add_argument("--steps", type=int, default=1500)
    second = commands.add_parser("run")
    second.add_argument("--steps", type=int, default=400)
    second.add_argument("--seeds", type=int, default=5)
    second.add_argument("--processes", type=int, default=1, help="networks that train at a time")
    parsed = parser.parse_args(arguments)
    if parsed.command == "pretrain":
        pretrain(parsed.data, parsed.steps)
    else:
        run(parsed.steps, parsed.seeds, parsed.processes)


if __name__ == "__main__":
    main()
