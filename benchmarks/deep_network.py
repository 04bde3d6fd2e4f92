"""How signals and gradients fare in a deep plain network at its start: no normalisation, no residuals, 100 layers.

    python benchmarks/deep_network.py [--seeds 10] [--layers 100] [--width 512]
    python benchmarks/deep_network.py --redraw    # from the numbers of results/deep_network.json

Measured for each basis and initialisation, over seeds, in float64: the second moment after every layer, and the rms of
the input's gradient for a gradient of N(0, 1) at the output. Writes results/deep_network.json and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from ortho_fx import ExpansionConfig
from ortho_fx.activations.expansion import make_activation
from ortho_fx.plots import line_styles, load_pyplot, save

RESULTS = Path(__file__).parent / "results"
NETWORKS = [
    *(("hermite", degree) for degree in (3, 5, 8)),
    *(("fourier", degree) for degree in (3, 5, 8)),
    *(("tropical", degree) for degree in (5, 12)),
    ("tropical_rational", 6),
]
INITS = ("stable", "paper")
HE = {"relu": (F.relu, 2.0), "gelu": (F.gelu, 2.0)}


def run(function, weight_variance: float, seed: int, layers: int, width: int) -> tuple[list[float], float]:
    """The second moment after each layer, and the rms of the input's gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first = h = normal(64, width).requires_grad_()
    moments = []
    for _ in range(layers):
        h = function(h @ (normal(width, width) * math.sqrt(weight_variance / width)))
        moments.append(h.square().mean().item())
    (grad,) = torch.autograd.grad((h * normal(*h.shape)).sum(), first)
    return moments, grad.square().mean().sqrt().item()


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def measure(seeds: int, layers: int, width: int) -> list[dict]:
    cases = [
        (f"{basis} {degree}", init, make_activation(ExpansionConfig(basis, degree, init), dtype=torch.float64), 1.0)
        for basis, degree in NETWORKS
        for init in INITS
    ]
    cases += [(name, "He", function, variance) for name, (function, variance) in HE.items()]
    rows = []
    for name, init, function, variance in cases:
        runs = [run(function, variance, seed, layers, width) for seed in range(seeds)]
        every = [moment for moments, _ in runs for moment in moments]
        grads = [grad for _, grad in runs]
        lost = next((i + 1 for i in range(layers) if not all(math.isfinite(m[i]) for m, _ in runs)), None)
        rows.append(
            {
                "activation": name,
                "init": init,
                "smallest_moment": finite(min(every)) if lost is None else None,
                "largest_moment": finite(max(every)) if lost is None else None,
                "smallest_gradient_rms": finite(min(grads)) if lost is None else None,
                "largest_gradient_rms": finite(max(grads)) if lost is None else None,
                "first_layer_not_finite": lost,
                "mean_moment_by_layer": [finite(sum(m[i] for m, _ in runs) / seeds) for i in range(layers)],
            }
        )
        shown = {key: value for key, value in rows[-1].items() if key != "mean_moment_by_layer"}
        print(*(f"{value:.3g}" if isinstance(value, float) else value for value in shown.values()), flush=True)
    return rows


def plot(result: dict, path: Path) -> None:
    titles = {"stable": 'init="stable"', "paper": 'init="paper"; ReLU and GELU with He weights'}
    figure, axes = load_pyplot().subplots(1, 2, figsize=(10, 5.4), sharey=True, layout="constrained")
    for axis, (init, title) in zip(axes, titles.items(), strict=True):
        rows = [row for row in result["rows"] if row["init"] in (init, "He" if init == "paper" else init)]
        for row, style in zip(rows, line_styles(row["activation"] for row in rows), strict=True):
            moments = [moment for moment in row["mean_moment_by_layer"] if moment is not None]
            label = {"relu": "ReLU", "gelu": "GELU"}.get(row["activation"], row["activation"].replace("_", " "))
            if len(moments) < result["layers"]:
                label += f", inf after layer {len(moments)}"
            axis.plot(range(1, len(moments) + 1), moments, **style, label=label, lw=1.8)
        axis.axhline(1, color="0.5", lw=0.6, zorder=0)
        axis.set(yscale="log", xlim=(0, result["layers"]), ylim=(1e-6, 1e6), title=title)
        axis.set_xlabel(f"layer (1 to {result['layers']})")
        axis.title.set_fontsize(11)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8.5, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    axes[0].set_ylabel("second moment E[h²] of the signal, log scale")
    figure.suptitle(
        f"Signals in plain networks of width {result['width']} at their start: a line is the mean of {result['seeds']} "
        "seeds; 1 is right",
        fontsize=11,
    )
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument(
        "--redraw", action="store_true", help="draw the numbers of the result file, and measure nothing"
    )
    arguments = vars(parser.parse_args())
    if arguments.pop("redraw"):
        plot(json.loads((RESULTS / "deep_network.json").read_text()), RESULTS / "deep_network.png")
        return
    result = {
        "date": date.today().isoformat(),
        "hardware": f"{torch.get_num_threads()} threads of a {platform.machine()} CPU",
        "torch": torch.__version__,
        **arguments,
        "rows": measure(**arguments),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "deep_network.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, RESULTS / "deep_network.png")


if __name__ == "__main__":
    main()
