"""Plots. Only this module needs matplotlib, which is an extra dependency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file
from ortho_fx.numerics.fit import FittedExpansion
from ortho_fx.numerics.sampling import differentiated, name_of

_INK, _RED = "0.25", "#c0392b"


def plot_fit(fit: FittedExpansion, path: str | Path) -> None:
    """Plots value and derivative of a fit and of its function over the interval, with the errors below.

    Raises:
        OrthoFxError: the file cannot be written, or matplotlib is missing.
    """
    pyplot = load_pyplot()
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
        top.plot(x, exact[column], color=_INK, lw=3.0, alpha=0.45, label=name_of(fit.function))
        top.plot(x, fitted[column], color=_RED, lw=1.4, label=str(fit.config))
        top.set_title(f"{title}: rmse {rmse:.2g}, max {largest:.2g}", fontsize=10)
        top.legend(frameon=False, fontsize=9, loc="upper left")
        bottom.plot(x, fitted[column] - exact[column], color=_RED, lw=1.0)
        bottom.axhline(0, color=_INK, lw=0.6)
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
            figure.savefig(temporary, dpi=dpi)
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
