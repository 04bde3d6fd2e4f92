"""The pictures of "Polynomial, trigonometric, and tropical activations" (arXiv 2502.01247), each by one command.

    python examples/paper_figures.py fits             known activations in three bases, in value and derivative
    python examples/paper_figures.py boundaries       what small networks learn on three sets of points in the plane
    python examples/paper_figures.py activations RUN  every activation of a run, before and after its training

Pictures go to runs/paper_figures, or to the folder of --out. `activations` is what `ortho-fx plot RUN` does: RUN
is the directory that `ortho-fx train` made.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image
from sklearn.datasets import make_circles, make_moons
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, calibrate_, fit, param_groups, rewrite_
from ortho_fx.models.runs.files import read_run
from ortho_fx.models.runs.plots import plot_runs
from ortho_fx.plots import STOCK, colour_of

matplotlib.use("agg")

PICTURES = Path("runs/paper_figures")
FUNCTIONS = {"GELU": F.gelu, "SiLU": F.silu, "ReLU": F.relu}
FITS = (ExpansionConfig("hermite", 8), ExpansionConfig("fourier", 6), ExpansionConfig("tropical_rational", 6))
NETWORKS = {
    "ReLU": None,
    "Hermite 3": ExpansionConfig("hermite", 3),
    "Fourier 5": ExpansionConfig("fourier", 5),
    "tropical 5": ExpansionConfig("tropical", 5),
    "tropical rational 6": ExpansionConfig("tropical_rational", 6),
}
# Of the two classes.
BLUE, RED = colour_of("hermite"), colour_of("tropical_rational")
CLASSES = LinearSegmentedColormap.from_list("classes", [BLUE, "white", RED])


def differentiated(function: object, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x)."""
    x = x.clone().requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def draw_fits(out: Path) -> list[Path]:
    """Draws a picture for each function: value and derivative above, their errors below, a column for each basis."""
    # The points avoid round numbers, where derivatives of functions with kinks jump.
    x = torch.linspace(-5, 5, 1200, dtype=torch.float64) + 1e-6
    drawn = []
    for name, function in FUNCTIONS.items():
        figure, axes = pyplot.subplots(
            2, len(FITS), figsize=(9.5, 4.2), sharex=True, sharey="row", layout="constrained",
            gridspec_kw={"height_ratios": [3, 1.3]},
        )  # fmt: skip
        exact = differentiated(function, x)
        for (top, bottom), config in zip(axes.T, FITS, strict=True):
            fitted = fit(function, config, weight="uniform", interval=(-5, 5), derivative_weight=1.0)
            style = {"color": colour_of(config.basis), "lw": 1.2}
            for exact_values, values, dash, label in zip(
                exact, differentiated(fitted, x), ("-", ":"), ("value", "derivative"), strict=True
            ):
                top.plot(x, exact_values, dash, color=STOCK, lw=4, alpha=0.25, label=f"{name}, {label}")
                top.plot(x, values, dash, **style, label=f"fit, {label}")
                bottom.semilogy(x, (values - exact_values).abs().clamp(min=1e-16), dash, **style)
            name_of_fit = str(config).replace("_", " ")
            errors = f"rmse {fitted.rmse:.1e}, of the derivative {fitted.derivative_rmse:.1e}"
            top.set_title(f"{name_of_fit}\n{errors}", fontsize=9)
            bottom.set_ylim(1e-6, 1)
            if max(fitted.max_error, fitted.derivative_max_error) < 1e-6:
                bottom.text(0.5, 0.5, "below 1e-6", ha="center", va="center", transform=bottom.transAxes, fontsize=9)
            bottom.set_xlabel("x")
            for axis in (top, bottom):
                axis.grid(alpha=0.2)
                axis.margins(x=0)
            top.legend(frameon=False, fontsize=7.5, loc="upper left")
        axes[0, 0].set_ylabel("f(x), f'(x)")
        axes[1, 0].set_ylabel("|error|")
        drawn.append(write(figure, out / f"fits_{name.lower()}.png"))
    return drawn


def spirals(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points on two spiral arms of one and a half turns, and their classes."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 2
    angle = 3 * math.pi * np.sqrt(random.uniform(0.02, 1, count))
    arms = np.stack([np.cos(angle + math.pi * labels), np.sin(angle + math.pi * labels)], 1) * angle[:, None]
    return arms + random.normal(scale=0.4, size=(count, 2)), labels


def datasets(count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        "moons": make_moons(count, noise=0.2, random_state=0),
        "circles": make_circles(count, noise=0.12, factor=0.5, random_state=0),
        "spirals": spirals(count),
    }


def make_classifier(config: ExpansionConfig | None, points: Tensor) -> nn.Module:
    """An MLP with two hidden layers of 16; the seed gives every activation the same initial weights."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    if config is not None:
        rewrite_(network, config)
        calibrate_(network, [points])
    return network


def train_classifier(network: nn.Module, points: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(param_groups(network, lr=1e-2, weight_decay=1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(points)[:, 0], labels).backward()
        optimizer.step()
        schedule.step()


def draw_boundaries(out: Path, steps: int) -> list[Path]:
    """Draws a row for each data set and a column for each activation; titles give the held-out half's accuracy."""
    chosen = datasets(600)
    figure, axes = pyplot.subplots(
        len(chosen),
        len(NETWORKS),
        figsize=(2 * len(NETWORKS), 2.15 * len(chosen)),
        layout="constrained",
        squeeze=False,
    )
    for row, (name, (points, classes)) in zip(axes, chosen.items(), strict=True):
        points = torch.from_numpy((points - points.mean(0)) / points.std(0)).float()
        seen, held, seen_classes, held_classes = train_test_split(
            points, torch.from_numpy(classes).float(), test_size=0.5, random_state=0
        )
        span = torch.linspace(-2.3, 2.3, 160)
        grid = torch.cartesian_prod(span, span)
        for axis, (label, config) in zip(row, NETWORKS.items(), strict=True):
            network = make_classifier(config, seen)
            train_classifier(network, seen, seen_classes, steps)
            with torch.no_grad():
                accuracy = ((network(held)[:, 0] > 0) == (held_classes > 0)).float().mean().item()
                probabilities = network(grid)[:, 0].sigmoid().reshape(len(span), len(span)).T
            levels = np.linspace(0, 1, 11)
            axis.contourf(span, span, probabilities, levels=levels, cmap=CLASSES, alpha=0.55)
            axis.contour(span, span, probabilities, levels=[0.5], colors="0.15", linewidths=1)
            colours = np.where(held_classes > 0, RED, BLUE)
            axis.scatter(*held.T, c=colours, s=5, edgecolors="white", linewidths=0.25)
            axis.set_title(f"{label}: {accuracy:.1%}", fontsize=9)
            axis.set(xticks=[], yticks=[], xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal")
            print(f"{name:8} {label:20} {accuracy:.1%}")
        row[0].set_ylabel(name)
    return [write(figure, out / "boundaries.png")]


def write(figure: pyplot.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    # A palette is enough for these pictures and takes less than half of the size.
    with Image.open(path) as picture:
        reduced = picture.convert("RGB").quantize(64)
    reduced.save(path, optimize=True)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fits").add_argument("--out", type=Path, default=PICTURES)
    boundaries = commands.add_parser("boundaries")
    boundaries.add_argument("--out", type=Path, default=PICTURES)
    boundaries.add_argument("--steps", type=int, default=600)
    activations = commands.add_parser("activations")
    activations.add_argument("directory", type=Path, metavar="RUN")
    activations.add_argument("--out", type=Path, default=PICTURES)
    parsed = parser.parse_args(arguments)
    if parsed.command == "fits":
        drawn = draw_fits(parsed.out)
    elif parsed.command == "boundaries":
        drawn = draw_boundaries(parsed.out, parsed.steps)
    else:
        drawn = plot_runs([read_run(parsed.directory)], parsed.out)
    for path in drawn:
        print(path)


if __name__ == "__main__":
    main()
