"""The picture of a comparison: validation curves, and where every seed ended."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.compare.report import ACCURACY, LOSS, ComparedRun, Comparison
from ortho_fx.plots import STOCK, line_styles, load_pyplot, save

# For prints in grey.
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def plot_comparison(comparison: Comparison, path: str | Path) -> None:
    """Draws validations over steps: the mean over seeds in a band from lowest to highest; beside it the last values.

    The first row shows the loss. Images have a second row for the accuracy.

    Raises:
        OrthoFxError: no finished run, a file that cannot be written, or no matplotlib.
    """
    finished = [run for run in comparison.runs if run.diverged is None]
    if not finished:
        raise OrthoFxError("there is no finished run to draw")
    pyplot = load_pyplot()
    steps = comparison.settings["steps"]
    shown = [name for name in comparison.activations if any(run.activation == name for run in finished)]
    rows: list[tuple[str, str, float]] = [(LOSS, "validation loss (nats)", 1.0)]
    if ACCURACY in finished[0].validations[steps]:
        rows.append((ACCURACY, "accuracy (%)", 100.0))
    height = max(2.8, 0.6 + 0.42 * len(shown))
    figure, axes = pyplot.subplots(
        len(rows), 2, figsize=(9, 0.6 + height * len(rows)), layout="constrained", squeeze=False
    )
    for (curves, last), (measure, label, scale) in zip(axes, rows, strict=True):
        for number, name in enumerate(shown):
            runs = [run for run in finished if run.activation == name]
            style = _style(name, comparison)
            _draw_curve(curves, runs, measure, scale, style)
            values = [scale * run.validations[steps][measure] for run in runs]
            mean = statistics.fmean(values)
            last.plot(values, [number] * len(values), style["marker"], color=style["color"], alpha=0.7, ms=6, mew=0)
            last.plot([mean, mean], [number - 0.25, number + 0.25], color=style["color"], lw=2)
            if name == comparison.reference:
                last.axvline(mean, color=STOCK, lw=1, ls="--", zorder=0)
        # The first steps are alike for all activations. With them, the later differences would be too small to see.
        late = [
            scale * run.validations[step][measure] for run in finished for step in run.validations if step >= steps / 5
        ]
        margin = 0.05 * (max(late) - min(late)) or 0.05
        curves.set_ylim(min(late) - margin, max(late) + margin)
        curves.set_ylabel(label)
        curves.set_xlabel("step")
        last.set_xlabel(label)
        last.set_yticks(range(len(shown)), [name.replace(",", ",\n") for name in shown], fontsize=8)
        last.set_ylim(len(shown) - 0.6, -0.6)
        for axis in (curves, last):
            axis.grid(alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
    count = len(comparison.seeds)
    axes[0, 0].set_title(f"mean and range over {count} seed{'s' * (count > 1)}", fontsize=10)
    axes[0, 1].set_title(f"after {steps:,} steps: each seed, and the mean", fontsize=10)
    save(figure, path)


def _style(name: str, comparison: Comparison) -> dict[str, Any]:
    number = comparison.activations.index(name)
    return {**line_styles(comparison.activations)[number], "marker": _MARKS[number % len(_MARKS)]}


def _draw_curve(axis: Any, runs: Sequence[ComparedRun], measure: str, scale: float, style: Mapping[str, Any]) -> None:
    steps = sorted(set.intersection(*(set(run.validations) for run in runs)))
    columns = [[scale * run.validations[step][measure] for run in runs] for step in steps]
    means = [statistics.fmean(column) for column in columns]
    axis.plot(steps, means, **style, lw=1.6, ms=5, mec="white", mew=0.5, markevery=max(1, len(steps) // 6))
    axis.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=style["color"], alpha=0.12, lw=0)
