"""Draws the time of every basis relative to GELU, from benchmarks/results/speed_cpu.json.

    python docs/pictures/speed.py

Writes speed.svg beside this file. `python benchmarks/speed.py` measures the times.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ortho_fx.bases import OURS
from ortho_fx.plots import STOCK, colour_of, load_pyplot, save

PICTURE = Path(__file__).parent / "speed.svg"


def times() -> dict[str, float]:
    """Forward and backward together, for each basis at its usual degree, in the order of the times."""
    numbers = importlib.util.spec_from_file_location("page_numbers", Path(__file__).parent.parent / "page_numbers.py")
    page_numbers = importlib.util.module_from_spec(numbers)
    numbers.loader.exec_module(page_numbers)
    labels = [f"{basis.name} {basis.default_degree}" for basis in OURS]
    measured = {label: float(page_numbers.time(label)) for label in labels}
    return dict(sorted({"GELU": 1.0, **measured}.items(), key=lambda one: one[1]))


def main() -> None:
    pyplot = load_pyplot()
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ortho_fx", "font.sans-serif": ["DejaVu Sans"]})
    measured = times()
    figure, axis = pyplot.subplots(figsize=(7.4, 3.4), layout="constrained")
    names = [label.replace("_", " ") for label in measured]
    bars = axis.barh(names, list(measured.values()), color=[colour_of(label) for label in measured], height=0.7)
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axis.axvline(1, color=STOCK, lw=1, ls="--")
    axis.set(xlabel="time of forward and backward, relative to GELU (compiled, float32, one CPU thread)")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, PICTURE)


if __name__ == "__main__":
    main()
