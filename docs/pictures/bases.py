"""Measures and draws every basis for its page: its functions, its start, and its fits of GELU, SiLU and ReLU.

    python docs/pictures/bases.py [hermite ...]    all bases, or those named

Writes bases/NAME.svg beside this file, and the numbers of all bases into benchmarks/results/bases.json. Nothing is
random and nothing is timed, so a second run writes the same.
"""

from __future__ import annotations

import argparse
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, GatedExpansion, PolyNormActivation, fit, freeze_, gains
from ortho_fx.activations.expansion import make_activation
from ortho_fx.bases import OURS, Basis, basis_named
from ortho_fx.numerics.sampling import differentiated
from ortho_fx.plots import STOCK, colour_of, load_pyplot, save

PICTURES = Path(__file__).parent / "bases"
RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "bases.json"
FITTED = {"GELU": F.gelu, "SiLU": F.silu, "ReLU": F.relu}
DEGREES = (2, 3, 5, 8, 12)
FAR = (-10.0, -5.0, 5.0, 10.0)
# The points avoid round numbers, where slopes jump.
X = torch.linspace(-4, 4, 1601, dtype=torch.float64) + 1e-6
_ROUNDED = re.compile(r"\d+\.\d{2,}")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)))


_TITLES = {
    "fourier": "the first waves of the start",
    "tropical": "the lines of the start",
    "tropical_rational": "the two maxima of the start",
    "safe_rational": "numerator and denominator of the start",
    "piecewise_power": "functions of the basis, with the knot t = 0",
}


def numbers_of(basis: Basis) -> dict[str, Any]:
    """The numbers of a basis at its usual degree, which its page shows."""
    degree = basis.default_degree
    start = make_activation(ExpansionConfig(basis.name, degree), dtype=torch.float64)
    model = nn.Sequential(make_activation(ExpansionConfig(basis.name, degree)))
    freeze_(model)
    with torch.no_grad():
        far = start(torch.tensor(FAR, dtype=torch.float64)).tolist()
    starts = ("stable", "paper") if basis.has_paper_start else ("stable",)
    fits = {name: fit(function, ExpansionConfig(basis.name, degree)) for name, function in FITTED.items()}
    return {
        "degree": degree,
        "learnable": ExpansionConfig(basis.name, degree).size,
        "starts": {init: vars(gains(ExpansionConfig(basis.name, degree, init))) for init in starts},
        "start_far_away": dict(zip(map(str, FAR), far, strict=True)),
        "fits": {
            name: {
                "rmse": fitted.rmse,
                "max_error": fitted.max_error,
                "derivative_rmse": fitted.derivative_rmse,
            }
            for name, fitted in fits.items()
        },
        "gelu_rmse": {n: fit(F.gelu, ExpansionConfig(basis.name, n)).rmse for n in DEGREES if n in basis.degrees},
        "frozen_form": model[0].form,
        "polynomial": basis.is_polynomial,
    }


def functions_of(basis: Basis) -> dict[str, Tensor]:
    """What the parameters multiply or place, at the points X, by a label for the legend."""
    x = X
    if basis.name == "hermite":
        he = [torch.ones_like(x), x]
        for k in range(2, 5):
            he.append((x * he[-1] - he[-2]) / k)
        return {f"He_{k}(x) / {k}!": he[k] for k in range(5)}
    if basis.name == "chebyshev":
        return {f"T_{k}(x / 4)": torch.cos(k * torch.arccos((x / 4).clamp(-1, 1))) for k in range(5)}
    if basis.name == "fourier":
        return {f"sin({0.35 * k:g} x) / {k}!": torch.sin(0.35 * k * x) / np.prod(range(1, k + 1)) for k in range(1, 5)}
    values = {name: torch.from_numpy(value) for name, value in basis.start(basis.default_degree).items()}
    if basis.name in ("tropical", "tropical_rational"):
        lines = {
            f"line {k}": s * x + b for k, (s, b) in enumerate(zip(values["slopes"], values["offsets"], strict=True))
        }
        if basis.name == "tropical":
            return lines
        below = (values["denominator_slopes"][:, None] * x + values["denominator_offsets"][:, None]).amax(0)
        return {"first maximum": torch.stack(list(lines.values())).amax(0), "second maximum": below}
    if basis.name == "safe_rational":
        top, root = (np.polynomial.Polynomial(values[name].numpy())(x.numpy()) for name in ("numerator", "denominator"))
        return {"numerator": torch.from_numpy(top), "denominator": torch.from_numpy(1 + root**2)}
    if basis.name == "piecewise_power":
        right, left = (x - values["knot"]).relu(), (x - values["knot"]).clamp(max=0)
        return {"(x − t), right": right, "(x − t)², right": right**2, "(x − t), left": left, "(x − t)², left": left**2}
    stock = basis.stock(x)  # type: ignore[attr-defined]
    return {
        "the activation": stock,
        **{key: value for key, value in functions_of(basis_named("hermite")).items() if "0!" not in key},
    }


def curves_of(basis: Basis) -> dict[str, dict[str, Tensor]]:
    """What the four panels show at the points X: functions, start, fits, errors of the fits."""
    degree = basis.default_degree
    start = make_activation(ExpansionConfig(basis.name, degree), dtype=torch.float64)
    value, slope = differentiated(start, X)
    fits, errors = {}, {}
    for name, function in FITTED.items():
        fits[name] = differentiated(fit(function, ExpansionConfig(basis.name, degree)), X)[0]
        errors[name] = (fits[name] - function(X)).abs()
    return {"functions": functions_of(basis), "start": {"f": value, "f'": slope}, "fits": fits, "errors": errors}


def draw(basis: Basis, curves: dict[str, dict[str, Tensor]], numbers: dict[str, Any], path: Path) -> None:
    from matplotlib.ticker import NullLocator

    figure, axes = _figure()
    (functions, start), (fits, errors) = axes
    colour, shades = colour_of(basis.name), _shades(colour_of(basis.name), len(curves["functions"]))
    for (label, y), shade, place in zip(curves["functions"].items(), shades, range(9), strict=False):
        _line(functions, y, label, color=shade, ls=_DASHES[place % 3])
    functions.set_title(_TITLES.get(basis.name, "functions of the basis"))
    gain = numbers["starts"]["stable"]
    _line(start, curves["start"]["f"], "f, the stable start", color=colour)
    _line(start, curves["start"]["f'"], "its derivative f'", color=colour, ls=_DASHES[1])
    start.set_title(f"start: gains {gain['forward']:.2f} and {gain['backward']:.2f}, slope {gain['slope']:.2f}")
    for shift, (name, function), dash in zip((0, 1, 2), FITTED.items(), _DASHES, strict=True):
        # One above the other, since the three activations are close.
        shifted = f" + {shift}" * (shift > 0)
        fits.plot(X, function(X) + shift, color=STOCK, lw=4, alpha=0.3)
        _line(fits, curves["fits"][name] + shift, f"fit of {name}{shifted}", color=colour, ls=dash)
        # Below the last digits of float32 there is nothing to see.
        y = curves["errors"][name].clamp(min=1e-8)
        _line(errors, y, f"{name}: rmse {_short(numbers['fits'][name]['rmse'])}", color=colour, ls=dash)
    fits.set_title(f"fits for inputs N(0, 1), degree {numbers['degree']}")
    fits.plot([], [], color=STOCK, lw=4, alpha=0.3, label="the activation")
    fits.legend(frameon=False, fontsize=7.5, loc="upper left")
    fits.set_ylim(-1, 7)
    errors.set(yscale="log", ylim=(1e-8, 30), title="error of the fits")
    errors.yaxis.set_minor_locator(NullLocator())
    for axis, label in zip(axes.flat, ("value", "f(x), f'(x)", "value", "|fit − activation|"), strict=True):
        axis.set_ylabel(label)
    _clip(functions, curves["functions"])
    _clip(start, curves["start"])
    _write(figure, path)


def draw_polynorm(path: Path) -> None:
    """How the output at one element depends on it, in rows that are the same but for their scale."""
    figure, axes = _figure(rows=1)
    module = PolyNormActivation().double()
    others = torch.from_numpy(np.random.default_rng(0).standard_normal(255))
    for degree, dash in zip((1, 2, 3), _DASHES, strict=True):
        rows = torch.cat([X[:, None], others.expand(len(X), -1)], 1)
        power = rows**degree
        _line(
            axes[0],
            (power / power.square().mean(1, keepdim=True).sqrt())[:, 0],
            ("x / rms(x)", "x² / rms(x²)", "x³ / rms(x³)")[degree - 1],
            color=STOCK,
            ls=dash,
        )
    for scale, dash in zip((0.1, 1.0, 10.0), _DASHES, strict=True):
        rows = scale * torch.cat([X[:, None], others.expand(len(X), -1)], 1)
        with torch.no_grad():
            y = module(rows)[:, 0]
        _line(axes[1], y, f"row of scale {scale:g}", color=STOCK, ls=dash, lw=4 - 1.4 * _DASHES.index(dash), alpha=0.6)
    axes[0].set_title("normalised powers, among 255 others of seed 0")
    axes[1].set_title("start of degree 3: three scales, one output")
    for axis in axes:
        axis.set(xlabel="element / scale of its row", ylabel="output")
        axis.set_ylim(-6, 6)
    _write(figure, path)


def draw_gated(path: Path) -> None:
    """y = f(a) b over a, for three values of b."""
    figure, axes = _figure(rows=1)
    for axis, basis in zip(axes, ("hermite", "silu_series"), strict=True):
        module = GatedExpansion(ExpansionConfig(basis), dtype=torch.float64)
        for b, dash in zip((1.0, 0.5, -1.0), _DASHES, strict=True):
            with torch.no_grad():
                _line(
                    axis,
                    module(X, torch.full_like(X, b)),
                    f"b = {b:g}".replace("-", "−"),
                    color=colour_of(basis),
                    ls=dash,
                )
        gain = gains(module)
        axis.set_title(f"{basis} 3: gains {gain.forward:.2f} and {gain.backward:.2f}")
        axis.set(xlabel="a", ylabel="f(a) b", ylim=(-4, 4))
    _write(figure, path)


def _figure(rows: int = 2) -> tuple[Any, Any]:
    pyplot = load_pyplot()
    # Texts stay texts, and with a fixed salt the names of an SVG's parts do not depend on the run.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ortho_fx", "font.sans-serif": ["DejaVu Sans"]})
    # Points that are this close to the line between their neighbours, in points of 1/72 inch, are left out.
    pyplot.rcParams.update({"path.simplify_threshold": 0.3, "font.size": 9, "axes.titlesize": 9.5})
    figure, axes = pyplot.subplots(rows, 2, figsize=(7.4, 2.9 * rows), layout="constrained")
    for axis in axes.flat:
        axis.set_xlabel("x")
        axis.grid(alpha=0.2)
        axis.margins(x=0)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Any, path: Path) -> None:
    """Saves the figure with one decimal, a tenth of a point, and without indents: half of the size."""
    save(figure, path)
    rounded = re.sub(
        r" d=\".*?\"",
        lambda found: _ROUNDED.sub(lambda n: f"{float(n[0]):.1f}", found[0]),
        path.read_text(),
        flags=re.DOTALL,
    )
    path.write_text(re.sub(r"\n\s+| transform=\"rotate\(-0 .*?\)\"", lambda found: found[0][:1].strip(" "), rounded))


def _line(axis: Any, y: Tensor, label: str, **style: Any) -> None:
    axis.plot(X, y, label=label, **{"lw": 1.5, **style})
    axis.legend(framealpha=0.8, edgecolor="none", fontsize=7.5, loc="best")


def _clip(axis: Any, curves: dict[str, Tensor]) -> None:
    """Keeps polynomials, which are steep at the ends, from making the middle flat."""
    middle = torch.stack([y[(X.abs() <= 2.5)] for y in curves.values()])
    low, high = float(middle.min()), float(middle.max())
    axis.set_ylim(low - 0.1 * (high - low), high + 0.35 * (high - low))


def _shades(colour: str, count: int) -> list[Any]:
    """From the colour to a lighter one."""
    rgb = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return [tuple(rgb + (1 - rgb) * 0.45 * place / max(count - 1, 1)) for place in range(count)]


def _short(error: float) -> str:
    return f"{error:.1g}" if error > 1e-12 else "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bases", nargs="*", metavar="NAME", help="a basis; all, polynorm and gated when omitted")
    names = parser.parse_args().bases or [*(basis.name for basis in OURS), "polynorm", "gated"]
    PICTURES.mkdir(exist_ok=True)
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"bases": {}}
    for name in names:
        path = PICTURES / f"{name}.svg"
        if name == "polynorm":
            draw_polynorm(path)
        elif name == "gated":
            draw_gated(path)
        else:
            numbers = result["bases"][name] = numbers_of(basis_named(name))
            draw(basis_named(name), curves_of(basis_named(name)), numbers, path)
    result |= {"date": date.today().isoformat(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
