"""The picture of a comparison: validation curves over steps and over time, and where every seed ended."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.compare.report import ACCURACY, LOSS, ComparedRun, Comparison
from ortho_fx.plots import STOCK, line_styles, load_pyplot, save

# For prints in grey.
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
# From here on the highest loss, divided by the lowest, asks for a logarithmic axis.
_WIDE = 20


def plot_comparison(comparison: Comparison, path: str | Path) -> None:
    """Draws validations as the mean over seeds in a band from lowest to highest; beside it the last values.

    Curves are over steps, of the runs of equal steps, and over seconds, of the runs of equal time; a kind that the
    reference alone has runs of is left out. The last values are of the kind that more activations have, of equal steps
    if both have as many. The first row shows the loss, on a logarithmic axis if it falls far. Images have a second row
    for the accuracy.

    Raises:
        OrthoFxError: no finished run of equal steps or time, a file that cannot be written, or no matplotlib.
    """
    kinds = _kinds(comparison)
    shown = [name for name in comparison.activations if any(name in kind.runs for kind in kinds)]
    if not shown:
        raise OrthoFxError("there is no finished run to draw")
    ends = max(kinds, key=lambda kind: len(kind.runs))
    pyplot = load_pyplot()
    unit = "" if comparison.loss_unit is None else f" ({comparison.loss_unit})"
    rows: list[tuple[str, str, float]] = [(LOSS, f"validation loss{unit}", 1.0)]
    late = [run for kind in kinds for own in kind.runs.values() for run in own]
    if ACCURACY in late[0].last:
        rows.append((ACCURACY, "accuracy (%)", 100.0))
    height = max(2.8, 0.6 + 0.42 * len(shown))
    size = (5 + 4 * len(kinds), 0.6 + height * len(rows))
    figure, axes = pyplot.subplots(len(rows), len(kinds) + 1, figsize=size, layout="constrained", squeeze=False)
    styles = _styles(comparison)
    for line, (measure, label, scale) in zip(axes, rows, strict=True):
        for axis, kind in zip(line, kinds, strict=False):
            for name, own in kind.runs.items():
                _draw_curve(axis, own, measure, scale, styles[name], kind.units[name])
            axis.set_xlabel(kind.unit)
            _set_limits(axis, late, measure, scale)
            axis.set_ylabel(label)
        last = line[-1]
        for number, name in enumerate(shown):
            style, values = styles[name], [scale * run.last[measure] for run in ends.runs.get(name, ())]
            if not values:
                continue
            mean = statistics.fmean(values)
            last.plot(values, [number] * len(values), style["marker"], color=style["color"], alpha=0.7, ms=6, mew=0)
            last.plot([mean, mean], [number - 0.25, number + 0.25], color=style["color"], lw=2)
            if name == comparison.reference:
                last.axvline(mean, color=STOCK, lw=1, ls="--", zorder=0)
        last.set_xlabel(label)
        last.locator_params(axis="x", nbins=6)
        last.set_yticks(range(len(shown)), [name.replace(",", ",\n") for name in shown], fontsize=8)
        last.set_ylim(len(shown) - 0.6, -0.6)
        for axis in line:
            axis.grid(alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
    seeds = f"{len(comparison.seeds)} seed{'s' * (len(comparison.seeds) > 1)}"
    for axis, kind in zip(axes[0], kinds, strict=False):
        axis.set_title(f"equal {kind.name}: mean and range over {seeds}", fontsize=10)
    axes[0, -1].set_title(f"at equal {ends.name}: each seed, and the mean", fontsize=10)
    save(figure, path)


@dataclass(frozen=True)
class _Kind:
    """The runs of one kind of equality.

    Args:
        name: what is equal.
        unit: that its curves are drawn over.
        runs: that finished, by activation.
        units: how many of them a step of each activation is.
    """

    name: str
    unit: str
    runs: dict[str, list[ComparedRun]]
    units: dict[str, float]


def _kinds(comparison: Comparison) -> list[_Kind]:
    """The kinds that an activation besides the reference has runs of, or those of the reference alone."""
    names, costs = comparison.activations, comparison.costs
    kinds = [
        _Kind("steps", "step", _finished(comparison, dict.fromkeys(names, comparison.steps)), dict.fromkeys(names, 1.0))
    ]
    # Measurements of other hours agree in their ratios alone.
    ratios = {name: ratio for name in names if (ratio := comparison.time_ratio(name)) is not None}
    if ratios:
        runs = _finished(comparison, {name: comparison.equal_time_steps(name) for name in ratios})
        units = {name: ratio * costs[comparison.reference].seconds for name, ratio in ratios.items()}
        kinds.append(_Kind("time", "seconds of training steps", runs, units))
    compared = [kind for kind in kinds if kind.runs.keys() - {comparison.reference}]
    return compared or [kind for kind in kinds if kind.runs][:1]


def _finished(comparison: Comparison, steps: Mapping[str, int | None]) -> dict[str, list[ComparedRun]]:
    """The finished runs of each activation that have these steps; without activations that have none."""
    runs = [run for run in comparison.runs if run.diverged is None]
    found = {name: [run for run in runs if (run.activation, run.steps) == (name, steps[name])] for name in steps}
    return {name: own for name, own in found.items() if own}


def _styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    names = comparison.activations
    found = enumerate(zip(names, line_styles(names), strict=True))
    return {name: {**line, "marker": _MARKS[number % len(_MARKS)]} for number, (name, line) in found}


def _set_limits(axis: Any, runs: Sequence[ComparedRun], measure: str, scale: float) -> None:
    # The first steps are alike for all activations. With them, the later differences would be too small to see.
    late = [scale * held[measure] for run in runs for step, held in run.validations.items() if step >= run.steps / 5]
    low, high = min(late), max(late)
    if measure == LOSS and high > _WIDE * low > 0:
        axis.set_yscale("log")
        margin = (high / low) ** 0.05
        axis.set_ylim(low / margin, high * margin)
    else:
        margin = 0.05 * (high - low) or 0.05
        axis.set_ylim(low - margin, high + margin)


def _draw_curve(
    axis: Any, runs: Sequence[ComparedRun], measure: str, scale: float, style: Mapping[str, Any], unit: float
) -> None:
    """Draws the validations of all seeds; a step is `unit` wide."""
    steps = sorted(set.intersection(*(set(run.validations) for run in runs)))
    columns = [[scale * run.validations[step][measure] for run in runs] for step in steps]
    means, places = [statistics.fmean(column) for column in columns], [unit * step for step in steps]
    axis.plot(places, means, **style, lw=1.6, ms=5, mec="white", mew=0.5, markevery=max(1, len(steps) // 6))
    axis.fill_between(places, list(map(min, columns)), list(map(max, columns)), color=style["color"], alpha=0.12, lw=0)
