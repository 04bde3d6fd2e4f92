"""The colours of every picture, and the picture of a fit. Only this module needs matplotlib, an extra dependency.

Each basis has one colour, and stock activations such as GELU are nearly black. Seven of the colours are Okabe and
Ito's ("Color universal design", 2008), four are Paul Tol's ("Colour schemes", 2021). The four keep the distance that
Okabe and Ito's have from one another, for readers with each kind of colour blindness too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file
from ortho_fx.numerics.fit import FittedExpansion
from ortho_fx.numerics.sampling import differentiated, name_of

COLOURS: Mapping[str, str] = {
    "hermite": "#0072B2",
    "fourier": "#009E73",
    "tropical": "#E69F00",
    "tropical_rational": "#D55E00",
    "chebyshev": "#56B4E9",
    "safe_rational": "#CC79A7",
    "piecewise_power": "#994455",
    "gelu_series": "#004488",
    "silu_series": "#222255",
    "relu_squared_series": "#661100",
}
# GELU, ReLU and all else that is no basis of ours.
STOCK = "#404040"
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
    return COLOURS.get(re.match("[a-z_]*", label)[0], STOCK)  # type: ignore[index]


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
