"""Plain networks of 50 and 100 layers train: no normalisation, no residuals, scikit-learn's digits.

    python benchmarks/deep_training.py [--only ACTIVATION ...] [--seeds 1]

Each activation is trained with four settings: its usual start or that of init "depth:L", and weights of N(0, 1 / n) or
orthogonal ones. ReLU and GELU have weights of He's variance 2 / n, and no start for a depth. A setting that does not
reach 95 % of the held-out digits is tried at two more learning rates. Adam takes 100 steps; the rate rises for 10 steps
and then falls to zero.

The networks of one activation and depth train side by side, in one tensor, because small operations cost more to start
than to compute. Rows in results/deep_training.json are not measured again, and each is written as soon as it is
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

from ortho_fx import ExpansionConfig, PolyNormActivation
from ortho_fx.activations.expansion import make_activation
from ortho_fx.bases import BASES
from ortho_fx.files import atomic_file
from ortho_fx.numerics.initialisation import initial_parameters
from ortho_fx.plots import line_styles, load_pyplot, save

RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "deep_training.json"
WIDTH, BATCH, STEPS, WARM_UP, HELD_OUT, ACCURACY = 64, 64, 100, 10, 360, 0.95
RATES, DEPTHS = (3e-4, 1e-3, 1e-4), (100, 50)
STOCK = {"relu": F.relu, "gelu": F.gelu}
ACTIVATIONS = (*BASES, "polynorm", *STOCK)


@dataclass(frozen=True)
class Setting:
    name: str
    deep_start: bool
    orthogonal: bool


USUAL = Setting("usual start", False, False)
REMEDY = Setting("depth:L, orthogonal", True, True)
SETTINGS = (USUAL, Setting("usual start, orthogonal", False, True), Setting("depth:L", True, False), REMEDY)


@dataclass(frozen=True)
class Run:
    setting: Setting
    seed: int


class Activation(nn.Module):
    """One activation for each run, for x of shape (runs, batch, width)."""

    def __init__(self, activation: str, inits: Sequence[str]) -> None:
        super().__init__()
        self.stock = STOCK.get(activation)
        if activation == "polynorm":
            self.each = nn.ModuleList(PolyNormActivation(init=init) for init in inits)
        elif self.stock is None:
            config = ExpansionConfig(activation, granularity="channel")
            self.all = make_activation(config, channels=len(inits), channel_dim=0)
            starts = [initial_parameters(ExpansionConfig(activation, init=init)) for init in inits]
            for name, tensor in self.all.state_dict().items():
                tensor.copy_(torch.stack([torch.from_numpy(start[name]) for start in starts], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        if self.stock is not None:
            return self.stock(x)
        if hasattr(self, "each"):
            return torch.stack([one(part) for one, part in zip(self.each, x, strict=True)])
        return self.all(x)


class Linear(nn.Module):
    """One linear layer for each run, with its weights from the run's generator."""

    def __init__(self, outputs: int, gain: float, runs: Sequence[Run], generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(runs), WIDTH, outputs))
        self.bias = nn.Parameter(torch.zeros(len(runs), 1, outputs))
        for weight, run, generator in zip(self.weight.data, runs, generators, strict=True):
            if run.setting.orthogonal:
                nn.init.orthogonal_(weight, gain, generator=generator)
            else:
                nn.init.normal_(weight, std=gain / math.sqrt(WIDTH), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def networks(activation: str, runs: Sequence[Run], depth: int, generators: Sequence[torch.Generator]) -> nn.Sequential:
    """`depth` layers of WIDTH, as many as the digits have pixels, and a readout, for each run."""
    gain = math.sqrt(2) if activation in STOCK else 1.0
    inits = [f"depth:{depth}" if run.setting.deep_start else "stable" for run in runs]
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [Linear(WIDTH, gain, runs, generators), Activation(activation, inits)]
    return nn.Sequential(*layers, Linear(10, 1.0, runs, generators))


@torch.no_grad()
def signals(model: nn.Sequential, images: Tensor, runs: int) -> list[dict[str, float]]:
    """What 100 inputs of each run are like before the readout.

    The mean cosine of pairs, the median of their second moments, and the deviation of the logarithms of these.
    """
    pairs = ~torch.eye(100, dtype=torch.bool)
    rows = []
    for h in model[:-1](images[:100].expand(runs, -1, -1)):
        h = h.double()  # 100 layers of GELU shrink a signal below the smallest square of float32
        moments, unit = h.square().mean(1), F.normalize(h, eps=1e-300)
        numbers = (unit @ unit.T)[pairs].mean(), moments.median(), moments.log().std()
        names = "cosine", "moment", "log_moment_deviation"
        rows.append({name: rounded(number) for name, number in zip(names, numbers, strict=True)})
    return rows


def rounded(value: Tensor) -> float | None:
    return float(f"{value.item():.4g}") if value.isfinite() else None


def train(
    activation: str, runs: Sequence[Run], depth: int, lr: float, data: tuple[Tensor, Tensor]
) -> list[dict[str, Any]]:
    """A row for each run: the losses up to one that is not finite, and the best accuracy on held-out digits."""
    images, labels = data
    generators = [torch.Generator().manual_seed(run.seed) for run in runs]
    model = networks(activation, runs, depth, generators)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (STEPS - step) / (STEPS - WARM_UP))
    )
    starts = signals(model, images, len(runs))
    losses, accuracy = [], torch.zeros(len(runs))
    for step in range(1, STEPS + 1):
        batches = torch.stack([torch.randint(HELD_OUT, len(images), (BATCH,), generator=g) for g in generators])
        logits = model(images[batches])
        loss = F.cross_entropy(logits.transpose(1, 2), labels[batches], reduction="none").mean(1)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            with torch.no_grad():
                guesses = model(images[:HELD_OUT].expand(len(runs), -1, -1)).argmax(2)
            accuracy = accuracy.maximum((guesses == labels[:HELD_OUT]).float().mean(1))
    rows = []
    for run, start, best_accuracy, own in zip(runs, starts, accuracy, torch.stack(losses).T, strict=True):
        finite = own.isfinite()
        ends = STEPS if finite.all() else int(finite.int().argmin())
        rows.append(
            {
                "activation": activation,
                "setting": run.setting.name,
                "depth": depth,
                "lr": lr,
                "seed": run.seed,
                "accuracy": rounded(best_accuracy),
                "not_finite_at_step": None if ends == STEPS else ends + 1,
                "signal_at_start": start,
                "losses": [rounded(loss) for loss in own[:ends]],
            }
        )
    return rows


def read() -> list[dict[str, Any]]:
    return json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []


def write(rows: Sequence[dict[str, Any]]) -> None:
    about = {
        "date": date.today().isoformat(),
        "hardware": f"{torch.get_num_threads()} threads of a {platform.machine()} CPU",
        "torch": torch.__version__,
        "width": WIDTH,
        "batch": BATCH,
        "steps": STEPS,
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    RESULTS.mkdir(exist_ok=True)
    with atomic_file(RESULT) as partial:
        partial.write_text(json.dumps(about, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')


def measure(activations: Sequence[str], seeds: int) -> None:
    data = digits()
    for lr in RATES:
        for depth in DEPTHS:
            for activation in activations:
                rows = read()
                settings = [s for s in SETTINGS if not (activation in STOCK and s.deep_start)]
                runs = [Run(setting, seed) for seed in range(seeds) for setting in settings]
                runs = [run for run in runs if is_missing(rows, activation, depth, lr, run)]
                if not runs:
                    continue
                measured = train(activation, runs, depth, lr, data)
                for row in measured:
                    print({name: value for name, value in row.items() if name != "losses"}, flush=True)
                write([*read(), *measured])


def is_missing(rows: Sequence[dict[str, Any]], activation: str, depth: int, lr: float, run: Run) -> bool:
    """Whether this rate is not measured yet, and no rate before it has reached the accuracy."""
    own = rows_of(rows, activation, run.setting, depth, run.seed)
    return all(row["lr"] != lr and row["accuracy"] < ACCURACY for row in own)


def rows_of(
    rows: Sequence[dict[str, Any]], activation: str, setting: Setting, depth: int, seed: int
) -> list[dict[str, Any]]:
    wanted = (activation, setting.name, depth, seed)
    return [row for row in rows if (row["activation"], row["setting"], row["depth"], row["seed"]) == wanted]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The accuracy in percent at the best rate, as the mean over the seeds, for each setting."""
    columns = [(depth, setting) for depth in sorted(DEPTHS) for setting in SETTINGS]
    lines = ["| | " + " | ".join(f"{depth}: {setting.name}" for depth, setting in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    seeds = sorted({row["seed"] for row in rows})
    for activation in ACTIVATIONS:
        cells = []
        for depth, setting in columns:
            found = [rows_of(rows, activation, setting, depth, seed) for seed in seeds]
            best = [100 * max(row["accuracy"] for row in own) for own in found if own]
            cells.append(f"{sum(best) / len(best):.0f}" if best else "")
        lines.append(f"| {activation} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    styles = line_styles(ACTIVATIONS)
    figure, axes = load_pyplot().subplots(2, 2, figsize=(11, 7.5), sharex=True, sharey=True, layout="constrained")
    for row_of_axes, depth in zip(axes, sorted(DEPTHS), strict=True):
        for axis, setting in zip(row_of_axes, (USUAL, REMEDY), strict=True):
            for style, activation in zip(styles, ACTIVATIONS, strict=True):
                own = rows_of(rows, activation, setting, depth, 0)
                if not own:
                    continue
                losses = max(own, key=lambda row: row["accuracy"])["losses"]
                smooth = [sum(losses[max(0, end - 5) : end]) / min(end, 5) for end in range(1, len(losses) + 1)]
                axis.plot(range(1, len(smooth) + 1), smooth, **style, lw=1.4, label=activation)
                if smooth and len(smooth) < STEPS:
                    axis.plot(len(smooth), smooth[-1], "x", color=style["color"], ms=8)
            axis.set(yscale="log", ylim=(5e-3, 20), title=f"{depth} layers, {setting.name}")
            axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss (nats, mean of 5 steps)")
    for axis in axes[-1]:
        axis.set_xlabel("step of Adam")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    title = f"Plain networks of width {WIDTH} on digits, seed 0, at the best rate; x: the next loss is not finite"
    figure.suptitle(title, fontsize=10)
    save(figure, path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS), metavar="ACTIVATION")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    measure(arguments.only, arguments.seeds)
    rows = read()
    plot(rows, RESULTS / "deep_training.png")
    print(table(rows))


if __name__ == "__main__":
    main()
