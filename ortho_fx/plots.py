"""The colours of every picture, and the picture of a fit. Only this module needs matplotlib, an extra dependency.

Each basis has one colour, its own, and stock activations such as GELU are nearly black. Six colours are Okabe and Ito's
("Color universal design", 2008), four are Paul Tol's ("Colour schemes", 2021). The four keep the distance that
Okabe and Ito's have from one another, for readers with each kind of colour blindness too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ortho_fx.activations.course import Course
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.bases import BASES
from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file
from ortho_fx.numerics.fit import FittedExpansion
from ortho_fx.numerics.sampling import differentiated, name_of

# GELU, ReLU and all else that is no basis of ours.
STOCK = "#404040"
# Sites of one picture, and functions of one site.
_MOST_SITES, _MOST_CURVES = 8, 6
_T = TypeVar("_T")
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)


def colour_of(label: str) -> str:
    """The colour of the basis that a label begins with ("hermite", "hermite 3", "hermite:3,lr=0.1"), or `STOCK`."""
    basis = BASES.get(re.match("[a-z_]*", label)[0])  # type: ignore[index]
    return STOCK if basis is None else basis.colour


def line_styles(labels: Iterable[str]) -> list[dict[str, Any]]:
    """Colour and dash of a line for each label. Lines of one colour differ in their dash, and then in lightness."""
    seen: Counter[str] = Counter()
    styles = []
    for label in labels:
        colour = colour_of(label)
        lightness, dash = divmod(seen[colour], len(_DASHES))
        seen[colour] += 1
        styles.append({"color": _lighter(colour, 1 - 0.6**lightness), "ls": _DASHES[dash]})
    return styles


def _lighter(colour: str, share: float) -> str:
    """The colour mixed with this share of white."""
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + share * (255 - part)):02X}" for part in parts)


def plot_fit(fit: FittedExpansion, path: str | Path) -> None:
    """Plots value and derivative of a fit and of its function over the interval, with the errors below.

    Raises:
        OrthoFxError: the file cannot be written, or matplotlib is missing.
    """
    pyplot, colour = load_pyplot(), colour_of(fit.config.basis)
    low, high = fit.interval
    # The middles of cells, not their edges: kinks are at round numbers, and derivatives jump there.
    x = low + (torch.arange(2000, dtype=torch.float64) + 0.5) * (high - low) / 2000
    exact = differentiated(fit.function, x)
    fitted = differentiated(fit, x)
    figure, axes = pyplot.subplots(
        2, 2, figsize=(9, 4.6), sharex=True, layout="constrained", gridspec_kw={"height_ratios": [3, 1]}
    )
    errors = ((fit.rmse, fit.max_error), (fit.derivative_rmse, fit.derivative_max_error))
    for column, (title, (rmse, largest)) in enumerate(zip(("value", "first derivative"), errors, strict=True)):
        top, bottom = axes[0, column], axes[1, column]
        top.plot(x, exact[column], color=STOCK, lw=3.0, alpha=0.35, label=name_of(fit.function))
        top.plot(x, fitted[column], color=colour, lw=1.4, label=str(fit.config))
        top.set_title(f"{title}: rmse {rmse:.2g}, max {largest:.2g}", fontsize=10)
        top.legend(frameon=False, fontsize=9, loc="upper left")
        bottom.plot(x, fitted[column] - exact[column], color=colour, lw=1.0)
        bottom.axhline(0, color=STOCK, lw=0.6)
        bottom.set_ylabel("error", fontsize=9)
        bottom.set_xlabel("x")
        for axis in (top, bottom):
            axis.grid(alpha=0.2)
            axis.margins(x=0)
    save(figure, path)


def plot_courses(courses: Mapping[str, Course]) -> Any:
    """A figure with a row for each course of an expansion: how its parameters moved, and its function at some steps."""
    pyplot = load_pyplot()
    names = spread(list(courses), _MOST_SITES)
    figure, axes = pyplot.subplots(
        len(names), 2, figsize=(9, 0.5 + 2.5 * len(names)), layout="constrained", squeeze=False
    )
    for (left, right), name in zip(axes, names, strict=True):
        course = courses[name]
        for number, parameter in enumerate(course.values[0]):
            colour = pyplot.get_cmap("tab10")(number)
            lines = torch.stack([_of_channels(values[parameter]) for values in course.values]).T
            for place, line in enumerate(lines):
                alpha = 1 - 0.65 * place / max(len(lines) - 1, 1)
                marks = {"marker": "."} if len(course.steps) == 1 else {}
                left.plot(
                    course.steps,
                    line - line[0],
                    color=colour,
                    alpha=alpha,
                    lw=1.2,
                    label="" if place else parameter,
                    **marks,
                )
        left.set_title(name.replace("$", r"\$"), fontsize=9, loc="left")
        left.set_ylabel(f"change since step {course.steps[0]:,}", fontsize=9)
        left.xaxis.get_major_locator().set_params(integer=True)
        x = torch.linspace(*course.interval, 300, dtype=torch.float64)
        shown = spread(list(range(len(course.steps))), _MOST_CURVES)
        for order, place in enumerate(shown):
            shade = pyplot.get_cmap("viridis")(0.85 * order / max(len(shown) - 1, 1))
            label = f"step {course.steps[place]:,}"
            right.plot(x, function_values(course.at(place), x).mean(1), color=shade, lw=1.4, label=label)
        right.set_ylabel("f(x)", fontsize=9)
        for axis in (left, right):
            if name == names[0]:
                axis.legend(frameon=False, fontsize=7)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.2, lw=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("step", fontsize=9)
    axes[-1, 1].set_xlabel("x", fontsize=9)
    return figure


def function_values(activation: ExpansionActivation, x: Tensor) -> Any:
    """f(x) for x (points,) as an array (points, channels); one column if it is the same for all channels."""
    with torch.no_grad():
        if activation.channels is None:
            return activation(x).numpy()[:, None]
        # Channels lie in the activation's channel dimension, the points in another; all other dimensions have size 1.
        dim = -1 if activation.channel_dim is None else activation.channel_dim
        shape = [1] * max(dim + 1, -dim, 2)
        points = 0 if dim % len(shape) else 1
        shape[points], shape[dim] = len(x), activation.channels
        everywhere = x.reshape([len(x) if place == points else 1 for place in range(len(shape))]).expand(shape)
        return activation(everywhere).movedim((points, dim), (0, 1)).reshape(len(x), -1).numpy()


def spread(items: list[_T], most: int) -> list[_T]:
    """The items, or so many of them that are evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _of_channels(value: Tensor) -> Tensor:
    """The numbers of a parameter, each as the mean over the channels that have their own."""
    return value.double().reshape(len(value), -1).mean(1) if value.dim() > 1 else value.double().reshape(-1)


def save(figure: Any, path: str | Path, dpi: int = 150) -> None:
    """Writes a figure to a file, whole or not at all; the ending of the path decides the format."""
    if not Path(path).parent.is_dir():  # which atomic_file would make
        raise OrthoFxError(f"cannot write {path}: there is no folder {Path(path).parent}")
    try:
        with atomic_file(Path(path)) as temporary:
            # Without a date, the same figure is the same file.
            figure.savefig(temporary, dpi=dpi, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
    except OrthoFxError:
        raise
    except (OSError, ValueError) as error:
        raise OrthoFxError(f"cannot write {path}: {error}") from None
    finally:
        load_pyplot().close(figure)


def load_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise OrthoFxError("plots need matplotlib: pip install matplotlib") from None
    # The backend "agg" writes files on machines without a display too.
    from matplotlib import pyplot

    if not matplotlib.is_interactive():
        pyplot.switch_backend("agg")
    return pyplot
