"""Plain networks of 50 and 100 layers train: no normalisation, no residuals, scikit-learn's digits.

    python benchmarks/deep_training.py [--only ACTIVATION ...] [--seeds 1]

Each activation is trained with four settings: its usual start or that of init "depth:L", and weights of N(0, 1 / n) or
orthogonal ones. ReLU and GELU have weights of He's variance 2 / n, and no start for a depth. A setting that does not
reach 95 % of the held-out digits is tried at two more learning rates. Adam takes 150 steps; the rate rises for 15 steps
and then falls to zero. Rows in results/deep_training.json are not measured again, and each is written as soon as it is
measured. Prints a table and draws results/deep_training.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits import digits
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, PolyNormActivation, param_groups
from ortho_fx.activations.expansion import make_activation
from ortho_fx.bases import BASES
from ortho_fx.files import atomic_file

RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "deep_training.json"
WIDTH, BATCH, STEPS, WARM_UP, HELD_OUT, ACCURACY = 64, 64, 150, 15, 360, 0.95
RATES = (3e-4, 1e-3, 1e-4)
STOCK = {"relu": nn.ReLU, "gelu": nn.GELU}
ACTIVATIONS = (*BASES, "polynorm", *STOCK)


@dataclass(frozen=True)
class Setting:
    name: str
    deep_start: bool
    orthogonal: bool
    depths: tuple[int, ...]


# In the order of their importance, so that a run that is stopped has the first ones.
SETTINGS = (
    Setting("depth:L and orthogonal weights", True, True, (100, 50)),
    Setting("usual start", False, False, (100, 50)),
    Setting("orthogonal weights", False, True, (100,)),
    Setting("depth:L", True, False, (100,)),
)


def make(activation: str, init: str) -> nn.Module:
    if activation in STOCK:
        return STOCK[activation]()
    return (
        PolyNormActivation(init=init)
        if activation == "polynorm"
        else make_activation(ExpansionConfig(activation, init=init))
    )


def network(activation: str, setting: Setting, depth: int, generator: torch.Generator) -> nn.Sequential:
    """`depth` linear layers of WIDTH with their activations, and a readout. The digits have WIDTH pixels as well."""
    gain = math.sqrt(2) if activation in STOCK else 1.0
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(WIDTH, WIDTH)
        if setting.orthogonal:
            nn.init.orthogonal_(linear.weight, gain, generator=generator)
        else:
            nn.init.normal_(linear.weight, std=gain / math.sqrt(WIDTH), generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, make(activation, f"depth:{depth}" if setting.deep_start else "stable")]
    readout = nn.Linear(WIDTH, 10)
    nn.init.normal_(readout.weight, std=1 / math.sqrt(WIDTH), generator=generator)
    nn.init.zeros_(readout.bias)
    return nn.Sequential(*layers, readout)


@torch.no_grad()
def signal(model: nn.Sequential, images: Tensor) -> dict[str, float]:
    """What 100 inputs are like before the readout: mean cosine of pairs, second moment, and its spread over inputs."""
    h = model[:-1](images[:100])
    moments = h.square().mean(1)
    cosines = F.normalize(h) @ F.normalize(h).T
    pairs = cosines[~torch.eye(len(h), dtype=torch.bool)]
    return {
        "cosine": rounded(pairs.mean()),
        "moment": rounded(moments.mean()),
        "log_moment_deviation": rounded(moments.log().std()),
    }


def rounded(value: Tensor) -> float:
    return float(f"{value.item():.4g}")


def train(
    activation: str, setting: Setting, depth: int, lr: float, seed: int, data: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """The losses of all steps, and the best validation accuracy; a run ends at a loss that is not finite."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    model = network(activation, setting, depth, generator)
    optimizer = torch.optim.Adam(param_groups(model, lr=lr))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (STEPS - step) / (STEPS - WARM_UP))
    )
    losses: list[float] = []
    accuracy, start, not_finite = 0.0, signal(model, images), None
    for step in range(1, STEPS + 1):
        batch = torch.randint(HELD_OUT, len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        if not loss.isfinite():
            not_finite = step
            break
        losses.append(rounded(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 15 == 0:
            with torch.no_grad():
                correct = model(images[:HELD_OUT]).argmax(1) == labels[:HELD_OUT]
            accuracy = max(accuracy, correct.sum().item() / HELD_OUT)
    return {
        "activation": activation,
        "setting": setting.name,
        "depth": depth,
        "lr": lr,
        "seed": seed,
        "accuracy": round(accuracy, 4),
        "not_finite_at_step": not_finite,
        "signal_at_start": start,
        "losses": losses,
    }


def read() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["activation"], row["setting"], row["depth"], row["lr"], row["seed"]


def add(row: dict[str, Any]) -> None:
    """Writes the row beside those that are in the file now; another process may have written some."""
    settings = {"width": WIDTH, "batch": BATCH, "steps": STEPS}
    result = {
        "date": date.today().isoformat(),
        "hardware": f"{torch.get_num_threads()} threads of a {platform.machine()} CPU",
        "torch": torch.__version__,
        **settings,
        "rows": [*read()["rows"], row],
    }
    RESULTS.mkdir(exist_ok=True)
    with atomic_file(RESULT) as partial:
        rows = ",\n".join(" " + json.dumps(row) for row in result.pop("rows"))
        partial.write_text(json.dumps(result, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')


def measure(activations: Sequence[str], seeds: int) -> None:
    data = digits()
    for lr in RATES:
        for seed in range(seeds):
            for setting in SETTINGS:
                for depth in setting.depths:
                    for activation in activations:
                        if activation in STOCK and setting.deep_start:
                            continue
                        rows = read()["rows"]
                        if any(key(row) == (activation, setting.name, depth, lr, seed) for row in rows):
                            continue
                        if reaches(best(rows, activation, setting.name, depth, seed)):
                            continue
                        row = train(activation, setting, depth, lr, seed, data)
                        print(*key(row), row["accuracy"], row["not_finite_at_step"], row["signal_at_start"], flush=True)
                        add(row)


def best(rows: list[dict[str, Any]], activation: str, setting: str, depth: int, seed: int) -> dict[str, Any] | None:
    """The row of the learning rate with the best accuracy."""
    wanted = (activation, setting, depth, seed)
    own = [row for row in rows if (row["activation"], row["setting"], row["depth"], row["seed"]) == wanted]
    return max(own, key=lambda row: row["accuracy"], default=None)


def reaches(row: dict[str, Any] | None) -> bool:
    return row is not None and row["accuracy"] >= ACCURACY


def table(rows: list[dict[str, Any]]) -> str:
    """The best accuracy in percent of each setting, as the mean over the seeds."""
    columns = [(setting, depth) for depth in (50, 100) for setting in SETTINGS[::-1] if depth in setting.depths]
    lines = ["| | " + " | ".join(f"{depth}: {setting.name}" for setting, depth in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    seeds = sorted({row["seed"] for row in rows})
    for activation in ACTIVATIONS:
        cells = []
        for setting, depth in columns:
            found = [best(rows, activation, setting.name, depth, seed) for seed in seeds]
            accuracies = [100 * row["accuracy"] for row in found if row]
            cells.append(f"{sum(accuracies) / len(accuracies):.0f}" if accuracies else "")
        lines.append(f"| {activation} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = pyplot.get_cmap("tab20").colors
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), sharex=True, sharey=True, layout="constrained")
    for row_of_axes, depth in zip(axes, (50, 100), strict=True):
        for axis, setting in zip(row_of_axes, (SETTINGS[1], SETTINGS[0]), strict=True):
            for colour, activation in zip(colours, ACTIVATIONS, strict=False):
                row = best(rows, activation, setting.name, depth, 0)
                if row is None:
                    continue
                style = "--" if activation in STOCK else "-"
                smooth = [sum(part) / len(part) for part in windows(row["losses"], 5)]
                (line,) = axis.plot(range(1, len(smooth) + 1), smooth, style, color=colour, lw=1.4, label=activation)
                if row["not_finite_at_step"] is not None and smooth:
                    axis.plot(len(smooth), smooth[-1], "x", color=line.get_color(), ms=7)
            axis.set(yscale="log", ylim=(1e-3, 10), title=f"{depth} layers, {setting.name}")
            axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss (nats, mean of 5 steps)")
    for axis in axes[-1]:
        axis.set_xlabel("step of Adam")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    figure.suptitle(
        f"Plain networks of width {WIDTH} on digits, seed 0, best of the rates; x: the loss is not finite", fontsize=10
    )
    figure.savefig(path, dpi=130)


def windows(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[max(0, end - size) : end] for end in range(1, len(values) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS), metavar="ACTIVATION")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    measure(arguments.only, arguments.seeds)
    rows = read()["rows"]
    plot(rows, RESULTS / "deep_training.png")
    print(table(rows))


if __name__ == "__main__":
    main()
