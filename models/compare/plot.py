"""The picture of a comparison: validation curves over steps and over time, and where every seed ended."""

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
    """Draws validations as the mean over seeds in a band from lowest to highest; beside it the last values.

    Curves are over steps, of the runs of equal steps, and over seconds, of the runs of equal time, if time was
    measured. The first row shows the loss. Images have a second row for the accuracy.

    Raises:
        OrthoFxError: no finished run of equal steps, a file that cannot be written, or no matplotlib.
    """
    runs = {name: _finished(comparison, name, comparison.steps) for name in comparison.activations}
    shown = [name for name, own in runs.items() if own]
    if not shown:
        raise OrthoFxError("there is no finished run to draw")
    pyplot = load_pyplot()
    rows: list[tuple[str, str, float]] = [(LOSS, "validation loss (nats)", 1.0)]
    if ACCURACY in runs[shown[0]][0].last:
        rows.append((ACCURACY, "accuracy (%)", 100.0))
    timed = bool(comparison.costs)
    height = max(2.8, 0.6 + 0.42 * len(shown))
    figure, axes = pyplot.subplots(
        len(rows), 2 + timed, figsize=(9 + 4 * timed, 0.6 + height * len(rows)), layout="constrained", squeeze=False
    )
    styles = _styles(comparison)
    for line, (measure, label, scale) in zip(axes, rows, strict=True):
        curves, last = line[0], line[-1]
        for number, name in enumerate(shown):
            style = styles[name]
            _draw_curve(curves, runs[name], measure, scale, style)
            values = [scale * run.last[measure] for run in runs[name]]
            mean = statistics.fmean(values)
            last.plot(values, [number] * len(values), style["marker"], color=style["color"], alpha=0.7, ms=6, mew=0)
            last.plot([mean, mean], [number - 0.25, number + 0.25], color=style["color"], lw=2)
            if name == comparison.reference:
                last.axvline(mean, color=STOCK, lw=1, ls="--", zorder=0)
        late = [run for own in runs.values() for run in own]
        curves.set_xlabel("step")
        if timed:
            ended = {name: _finished(comparison, name, comparison.equal_time_steps(name)) for name in shown}
            for name in shown:
                ratio = comparison.time_ratio(name)
                if ended[name] and ratio is not None:
                    # Measurements of other hours agree in their ratios alone.
                    unit = ratio * comparison.costs[comparison.reference].seconds
                    _draw_curve(line[1], ended[name], measure, scale, styles[name], unit)
            late += [run for own in ended.values() for run in own]
            line[1].set_xlabel("seconds of training steps")
        for axis in line[:-1]:
            axis.set_ylim(*_limits(late, measure, scale))
            axis.set_ylabel(label)
        last.set_xlabel(label)
        last.set_yticks(range(len(shown)), [name.replace(",", ",\n") for name in shown], fontsize=8)
        last.set_ylim(len(shown) - 0.6, -0.6)
        for axis in line:
            axis.grid(alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
    seeds = f"{len(comparison.seeds)} seed{'s' * (len(comparison.seeds) > 1)}"
    axes[0, 0].set_title(f"equal steps: mean and range over {seeds}", fontsize=10)
    if timed:
        axes[0, 1].set_title(f"equal time: mean and range over {seeds}", fontsize=10)
    axes[0, -1].set_title(f"after {comparison.steps:,} steps: each seed, and the mean", fontsize=10)
    save(figure, path)


def _finished(comparison: Comparison, name: str, steps: int | None) -> list[ComparedRun]:
    runs = [run for run in comparison.runs if (run.activation, run.steps) == (name, steps)]
    return [run for run in runs if run.diverged is None]


def _styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    names = comparison.activations
    found = enumerate(zip(names, line_styles(names), strict=True))
    return {name: {**line, "marker": _MARKS[number % len(_MARKS)]} for number, (name, line) in found}


def _limits(runs: Sequence[ComparedRun], measure: str, scale: float) -> tuple[float, float]:
    # The first steps are alike for all activations. With them, the later differences would be too small to see.
    late = [scale * held[measure] for run in runs for step, held in run.validations.items() if step >= run.steps / 5]
    margin = 0.05 * (max(late) - min(late)) or 0.05
    return min(late) - margin, max(late) + margin


def _draw_curve(
    axis: Any, runs: Sequence[ComparedRun], measure: str, scale: float, style: Mapping[str, Any], unit: float = 1.0
) -> None:
    """Draws the validations of all seeds; a step is `unit` wide."""
    steps = sorted(set.intersection(*(set(run.validations) for run in runs)))
    columns = [[scale * run.validations[step][measure] for run in runs] for step in steps]
    means, places = [statistics.fmean(column) for column in columns], [unit * step for step in steps]
    axis.plot(places, means, **style, lw=1.6, ms=5, mec="white", mew=0.5, markevery=max(1, len(steps) // 6))
    axis.fill_between(places, list(map(min, columns)), list(map(max, columns)), color=style["color"], alpha=0.12, lw=0)
