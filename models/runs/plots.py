"""Pictures of training runs: losses and gradients side by side, and each activation before and after."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from ortho_fx.activations.course import Course
from ortho_fx.errors import OrthoFxError
from ortho_fx.models.runs.files import Row, Run
from ortho_fx.models.weights.expansions import SavedExpansion, SavedExpansions, SiteInputs
from ortho_fx.numerics.moments import Array
from ortho_fx.passes.vocabulary.targets import Reference
from ortho_fx.plots import STOCK, colour_of, function_values, line_styles, load_pyplot, plot_courses, save

_BEFORE = "0.6"
_REFERENCE_DASH = (0, (4, 2))
_DPI = 200
_POINTS = 400
_PLAIN = " ._+-,=:[]()"
_LONGEST = 200  # of a file's name without its ending; file systems take 255 bytes


def plot_runs(runs: Sequence[Run], out: str | Path) -> list[Path]:
    """Draws runs into a directory and returns the files.

    loss.png and norm.png show all runs. Each run with expansions has sites/NAME.png for every site, sites.png with all
    of them if there are several, drift.png, and coefficients.png with the parameters over the steps. They are in `out`,
    or with several runs in a subdirectory of `out` with the run's name.

    Raises:
        OrthoFxError: no run, a run without a step yet, a directory that cannot be written, or no matplotlib.
    """
    if not runs:
        raise OrthoFxError("there is no run to draw")
    for run in runs:
        if not run.rows:
            raise OrthoFxError(f"{run.directory} has no step to draw yet")
    out = Path(out)
    labels = _labels(runs)
    drawn = [_plot_losses(runs, labels, out / "loss.png"), _plot_norms(runs, labels, out / "norm.png")]
    for run, label in zip(runs, labels, strict=True):
        own = out if len(runs) == 1 else out / file_name(label)
        if any("drift" in row for row in run.site_rows):
            drawn.append(_plot_drift(run, own / "drift.png"))
        courses = courses_of(run)
        if courses:
            drawn.append(_write(plot_courses(courses), own / "coefficients.png"))
        drawn += _plot_sites(run, own)
    return drawn


def courses_of(run: Run) -> dict[str, Course]:
    """What each recorded site of a run was over its steps; none for runs of releases that did not record it."""
    if run.now is None:
        return {}
    courses: dict[str, Course] = {}
    for row in run.coefficient_rows:
        name = row["site"]
        saved = run.now.sites.get(name)
        if saved is None:
            continue
        if name not in courses:
            courses[name] = Course(saved.activation)
            if saved.inputs is not None and saved.inputs.counts:
                courses[name].interval = _interval([saved.inputs], 1e-3)
        courses[name].steps.append(row["step"])
        courses[name].values.append(
            {key: torch.tensor(_numbers(value), dtype=torch.float64) for key, value in row["parameters"].items()}
        )
    return courses


def _numbers(values: Any) -> Any:
    """Nested lists of a row, with NaN for what JSON cannot hold."""
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    return math.nan if values is None else values


def _labels(runs: Sequence[Run]) -> list[str]:
    """The directories' names, preceded by the parent's name if two are the same."""
    paths = [run.directory.resolve() for run in runs]
    twice = {name for name, count in Counter(path.name for path in paths).items() if count > 1}
    return [f"{path.parent.name}-{path.name}" if path.name in twice else path.name for path in paths]


def _plot_losses(runs: Sequence[Run], labels: Sequence[str], path: Path) -> Path:
    accuracy = any("accuracy" in row for run in runs for row in run.rows)
    size = (6 + 4.5 * accuracy, 4)
    figure, axes = load_pyplot().subplots(
        1, 1 + accuracy, figsize=size, layout="constrained", sharex=True, squeeze=False
    )
    figure.get_layout_engine().set(w_pad=0.1)
    left, right = axes[0, 0], axes[0, -1]
    for run, label, style in zip(runs, labels, _styles(runs), strict=True):
        _curve(left, run.rows, "loss", style, plain(label))
        _validations(left, run, "validation_loss", style)
        if accuracy:
            _validations(right, run, "accuracy", style, plain(label))
    left.plot([], [], color="0.3", lw=1.6, label="training, smoothed")
    left.plot([], [], color="0.3", lw=1.0, ls=(0, (4, 2)), marker="o", ms=3.5, mfc="white", label="validation")
    losses = [row[key] for run in runs for row in run.rows for key in ("loss", "validation_loss") if key in row]
    _log_scale(left, losses, 2)
    _dress(left, "step", "loss (nats)")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    if accuracy:
        _dress(right, "step", "validation accuracy")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _write(figure, path)


def _plot_norms(runs: Sequence[Run], labels: Sequence[str], path: Path) -> Path:
    figure, axis = load_pyplot().subplots(figsize=(6, 3.6), layout="constrained")
    for run, label, style in zip(runs, labels, _styles(runs), strict=True):
        _curve(axis, run.rows, "gradient_norm", style, plain(label))
        skipped = [row["step"] for row in run.rows if row.get("skipped")]
        if skipped:
            place = axis.get_xaxis_transform()
            axis.plot(skipped, [0.03] * len(skipped), "x", color=style["color"], ms=5, transform=place)
            axis.plot([], [], "x", color=style["color"], ms=5, label=f"{plain(label)}: skipped step")
    _log_scale(axis, [row["gradient_norm"] for run in runs for row in run.rows if "gradient_norm" in row], 5)
    _dress(axis, "step", "norm of the gradient")
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    return _write(figure, path)


def _plot_drift(run: Run, path: Path) -> Path:
    names = list(dict.fromkeys(row["site"] for row in run.site_rows))
    beside = math.ceil(len(names) / 22)  # columns of the legend
    figure, (left, right) = load_pyplot().subplots(1, 2, figsize=(8 + 1.5 * beside, 3.8), layout="constrained")
    # A sequence of colours shows the order of the sites. Its lightest end is too light for a line.
    colours = load_pyplot().get_cmap("viridis")(np.linspace(0, 0.88, len(names)))
    for name, colour in zip(names, colours, strict=True):
        rows = [row for row in run.site_rows if row["site"] == name]
        steps = [row["step"] for row in rows]
        left.plot(steps, [row["drift"] for row in rows], color=colour, lw=1.4, marker=".", ms=4, label=plain(name))
        right.plot(steps, [row["std"] for row in rows], color=colour, lw=1.4, marker=".", ms=4)
    _dress(left, "step", r"drift  $\Vert\theta-\theta_0\Vert\,/\,\Vert\theta_0\Vert$")
    _dress(right, "step", "standard deviation of the inputs")
    left.set_ylim(bottom=0)
    if not _log_scale(right, [row["std"] for row in run.site_rows], 30):
        right.set_ylim(bottom=0)
    figure.get_layout_engine().set(w_pad=0.1)
    entries = left.get_legend_handles_labels()
    figure.legend(*entries, frameon=False, fontsize=7, loc="outside right center", ncols=beside)
    return _write(figure, path)


def _plot_sites(run: Run, out: Path) -> list[Path]:
    if run.start is None or run.now is None:
        return []
    before, after = run.start, run.now
    names = [name for name in after.sites if name in before.sites]
    legend = _legend_of(before, after)
    drawn = []
    for name in names:
        figure, axis = load_pyplot().subplots(figsize=(4.6, 3.6), layout="constrained")
        _plot_site(axis, before.sites[name], after.sites[name])
        axis.set_title(f"{plain(name)}: {after.sites[name].activation.config}", fontsize=9)
        _dress(axis, "x", "f(x)")
        axis.legend(*legend, frameon=False, fontsize=7.5, loc="best")
        drawn.append(_write(figure, out / "sites" / f"{file_name(name)}.png"))
    if len(names) > 1:
        columns = _columns(len(names))
        rows = math.ceil(len(names) / columns)
        figure, axes = load_pyplot().subplots(
            rows, columns, figsize=(2.1 * columns, 1.8 * rows + 0.4), layout="constrained", squeeze=False
        )
        for axis, name in zip(axes.flat, names, strict=False):
            _plot_site(axis, before.sites[name], after.sites[name], thin=True)
            axis.set_title(plain(_short(name)), fontsize=7)
            _dress(axis, "", "", size=6)
        # One label for all, since the axes of a large grid have no room for their own.
        figure.supxlabel("input x of the activation", fontsize=8)
        figure.supylabel("f(x)", fontsize=8)
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        beside = min(len(legend[0]), max(2, round(1.5 * columns)))  # as many as fit above the grid
        figure.legend(*legend, frameon=False, fontsize=8, loc="outside upper center", ncols=beside)
        drawn.append(_write(figure, out / "sites.png"))
    return drawn


def _plot_site(axis: Any, before: SavedExpansion, after: SavedExpansion, *, thin: bool = False) -> None:
    """Draws an activation over the range of its inputs, with the inputs' densities at the bottom of the axes."""
    seen = [saved.inputs for saved in (before, after) if saved.inputs is not None and saved.inputs.counts]
    low, high = _interval(seen, 1e-3)
    x = torch.linspace(low, high, _POINTS, dtype=torch.float64)
    width, colour_after = 1.2 if thin else 1.8, colour_of(after.activation.config.basis)
    shown = []
    for saved, colour, order in ((before, _BEFORE, 2), (after, colour_after, 3)):
        y = function_values(saved.activation.double(), x)
        middle = y.mean(1)
        axis.plot(x, middle, color=colour, lw=width, zorder=order)
        shown.append(middle)
        if y.shape[1] > 1:
            band = np.quantile(y, [0.1, 0.9], axis=1)
            axis.fill_between(x, *band, color=colour, alpha=0.25, lw=0, zorder=order - 1)
            shown += list(band)
    if after.activation.reference is not None:
        exact = after.activation.reference(x).numpy()
        axis.plot(x, exact, color=STOCK, lw=0.7 * width, ls=_REFERENCE_DASH, zorder=4)
        shown.append(exact)
    # A polynomial's ends are steep and few inputs are there, so the curve may leave the axes.
    left, right = _interval(seen, 0.1)
    inside = np.stack(shown)[:, (x.numpy() >= left) & (x.numpy() <= right)]
    room = (inside.max() - inside.min()) or 1.0
    axis.set_ylim(inside.min() - 0.35 * room, inside.max() + 0.08 * room)
    axis.set_xlim(low, high)
    place, highest = axis.get_xaxis_transform(), max((inputs.density.max() for inputs in seen), default=1.0)
    for saved, colour in ((before, _BEFORE), (after, colour_after)):
        if saved.inputs is not None and saved.inputs.counts:
            heights, fill = 0.2 * saved.inputs.density / highest, {"color": colour, "alpha": 0.3, "lw": 0}
            axis.stairs(heights, saved.inputs.edges, fill=True, transform=place, zorder=0, **fill)


def _legend_of(before: SavedExpansions, after: SavedExpansions) -> tuple[list[Any], list[str]]:
    """Handles and texts of the legend for `_plot_site`."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = [site.activation.reference for site in after.sites.values()]
    replaced = sorted({reference.target for reference in found if isinstance(reference, Reference)})
    colour = colour_of(_basis_of(after))
    legend: dict[str, Any] = {
        "start" if before.step == 0 else f"step {before.step}": Line2D([], [], color=_BEFORE, lw=1.8),
        f"step {after.step}": Line2D([], [], color=colour, lw=1.8),
    }
    if replaced:
        legend[", ".join(replaced)] = Line2D([], [], color=STOCK, lw=1.2, ls=_REFERENCE_DASH)
    if any(site.activation.channels is not None for site in after.sites.values()):
        legend["10-90 % of channels"] = Patch(color=colour, alpha=0.25, lw=0)
    legend["density of x"] = Patch(color="0.5", alpha=0.3, lw=0)
    return list(legend.values()), list(legend)


def _interval(inputs: Sequence[SiteInputs], outside: float) -> tuple[float, float]:
    """The interval that holds all inputs of each measurement, except a share `outside`."""
    if not inputs:
        return -4.0, 4.0
    ends = []
    for seen in inputs:
        share = np.concatenate([[0.0], np.cumsum(seen.counts)]) / sum(seen.counts)
        ends.append(np.interp([outside / 2, 1 - outside / 2], share, seen.edges))
    return float(np.min(ends)), float(np.max(ends))


def _curve(axis: Any, rows: Sequence[Row], key: str, style: dict[str, Any], label: str) -> None:
    """Draws the numbers as a thin line behind a smoothed one."""
    steps = np.array([row["step"] for row in rows if key in row])
    values = np.array([row[key] for row in rows if key in row], dtype=float)
    axis.plot(steps, values, color=style["color"], lw=0.5, alpha=0.35, zorder=1)
    axis.plot(steps, _smoothed(values), lw=1.6, zorder=3, label=label, **style)


def _validations(axis: Any, run: Run, key: str, style: dict[str, Any], label: str | None = None) -> None:
    rows = [row for row in run.rows if key in row]
    dashed = {"color": style["color"], "ls": (0, (4, 2))} if label is None else style
    marks = {"marker": "o", "ms": 3.5, "mfc": "white", "lw": 1.0 if label is None else 1.4}
    axis.plot([row["step"] for row in rows], [row[key] for row in rows], zorder=4, label=label, **marks, **dashed)


def _smoothed(values: Array) -> Array:
    """An exponential mean without bias towards zero at the start; its half-life is a hundredth of the values."""
    keep = 0.5 ** (1 / max(len(values) / 100, 1))
    total = weight = 0.0
    smoothed = np.empty(len(values))
    for place, value in enumerate(values):
        # A skipped step has no finite number, so it does not count.
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        smoothed[place] = total / weight if weight else math.nan
    return smoothed


def _styles(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The style of each run: the colour of its basis, and a dash if several runs have the same basis."""
    return line_styles(_basis_of(run.now) for run in runs)


def _basis_of(saved: SavedExpansions | None) -> str:
    """The basis of the first expansion; empty without one."""
    return next((site.activation.config.basis for site in saved.sites.values()), "") if saved is not None else ""


def _log_scale(axis: Any, values: Sequence[float], least_span: float) -> bool:
    """Makes the axis logarithmic, with plain numbers, if the values span a factor of `least_span`."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0 or max(finite) < least_span * min(finite):
        return False
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    decades = math.log10(max(finite) / min(finite))
    subs = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    return True


def _dress(axis: Any, x: str, y: str, size: int = 9) -> None:
    axis.set_xlabel(x, fontsize=size)
    axis.set_ylabel(y, fontsize=size)
    axis.tick_params(labelsize=size - 1, length=2.5)
    for side in (axis.xaxis, axis.yaxis):
        side.offsetText.set_fontsize(size - 1)
    if x == "step":
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.2, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _columns(count: int) -> int:
    """Number of columns for a grid somewhat wider than high, with few empty places."""
    wanted = 1.4 * math.sqrt(count)
    return min(range(1, 7), key=lambda columns: -count % columns + 2 * abs(columns - wanted))


def file_name(name: str) -> str:
    """A name for a file in one folder, another for every name: what could leave the folder or be hidden is escaped.

    Letters, digits and " _+-,=:[]" stay as they are, and dots that do not come first; other characters are written as
    in a URL. A longer name than file systems take ends in a digest of it.
    """
    written = "".join(
        c if (c.isalnum() and c.isascii()) or c in _PLAIN else quote(c, safe="", errors="surrogatepass") for c in name
    )
    if not name:
        return "%"  # which stands alone for no other name
    if name.startswith("."):
        written = "%2E" + written[1:]
    if len(written) > _LONGEST:
        written = f"{written[: _LONGEST - 17]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"
    return written


def plain(name: str) -> str:
    """The name as text for matplotlib, which reads $...$ as mathematics and leaves out labels that begin with "_"."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
    return " " * shown.startswith("_") + shown.replace("$", r"\$")


def _short(name: str) -> str:
    """The name shortened to fit above a small picture; the end is kept, since it tells sites apart."""
    return name if len(name) <= 32 else "\u2026" + name[-31:]


def _write(figure: Any, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OrthoFxError(f"cannot write {path.parent}: {error.strerror}") from None
    save(figure, path, dpi=_DPI)
    return path
