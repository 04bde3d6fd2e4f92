"""`fit_expansion`: finds the expansion closest to a function, in value and derivative. It is deterministic and fast.

The squared error is a weighted sum over nodes. The nodes are those of Gauss-Legendre quadrature, on panels whose edges
include the kinks of common activations, or the bins of a histogram of measured inputs. Fourier and tropical functions
are fitted in units of the weight's mean and standard deviation, and rescaled exactly.

Each basis has its own fit method, in `ortho_fx.bases`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ortho_fx.arguments import checked_function, is_number
from ortho_fx.bases import basis_named
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.numerics.least_squares import Problem
from ortho_fx.numerics.moments import Array
from ortho_fx.numerics.sampling import differentiated, name_of

WEIGHTS = ("gaussian", "uniform", "measured")
# A panel has 8 nodes. Its width is 1/4, halved until it is below a third of a standard deviation. So the kinks of
# common activations, at integers, are edges of panels. The reach of a basis is 8 deviations, beyond which the density
# vanishes, or 16 for Hermite, beyond which He_32^2 times the density vanishes.
_NODES, _PANEL, _MOST_PANELS = 8, 0.25, 512
# Without an interval, Gaussian errors are stated within so many standard deviations, at so many points.
_STATED, _POINTS = 5.0, 2000
# Widths and places of inputs. Squares of these are far from the ends of float64's range.
_SMALLEST, _LARGEST, _APART = 1e-30, 1e30, 1e-9
# An exact fit is off by at most this share of the value, for inputs up to this size.
_EXACT, _FAR = 1e-6, 30.0


@dataclass(frozen=True)
class FittedExpansion:
    """An expansion y fitted to a function g, with its errors; calling it computes y(x), for x of any shape in float64.

    Attributes:
        function: the fitted function g.
        config: the expansion; its init is "fit".
        parameters: its parameters by name, float64 arrays of shape (size,).
        weight: w, "gaussian", "uniform" or "measured".
        interval: the interval on which the errors are stated, in units of x.
        rmse: sqrt(sum w (y - g)^2), with weights w of sum 1.
        max_error: max |y - g| on the interval, at 2,000 points.
        derivative_rmse, derivative_max_error: the same for y' - g'.
        bounds: the bounds to which inputs are clamped; None without a clamp.
    """

    function: Callable[[Tensor], Tensor]
    config: ExpansionConfig
    parameters: Mapping[str, Array]
    weight: str
    interval: tuple[float, float]
    rmse: float
    max_error: float
    derivative_rmse: float
    derivative_max_error: float
    bounds: tuple[float, float] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """y(x) in float64."""
        return _evaluate(self.config, self.parameters, self.bounds, x.double())

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            f"{self.config} fit of {name_of(self.function)}, {self.weight} weight, errors on [{low:g}, {high:g}]",
            f"value       rmse {self.rmse:.3g}  max {self.max_error:.3g}",
            f"derivative  rmse {self.derivative_rmse:.3g}  max {self.derivative_max_error:.3g}",
        ]
        for name, values in self.parameters.items():
            lines.append(f"{name}  " + " ".join(f"{value:.8g}" for value in values))
        return "\n".join(lines)


def fit_expansion(
    function: Callable[[Tensor], Tensor],
    config: ExpansionConfig | None = None,
    *,
    weight: str = "gaussian",
    interval: tuple[float, float] | None = None,
    derivative_weight: float = 0.0,
    mean: float = 0.0,
    std: float = 1.0,
    samples: Tensor | Histogram | None = None,
) -> FittedExpansion:
    """The fit of `ortho_fx.fit`, without its methods for modules and plots."""
    checked_function(function)
    if config is not None and not isinstance(config, ExpansionConfig):
        raise OrthoFxError(f"config must be an ExpansionConfig; got {config!r}")
    if not isinstance(samples, Tensor | Histogram | None):
        raise OrthoFxError(f"samples must be a tensor; got {type(samples).__name__}")
    config = _with_fit(config or ExpansionConfig())
    if isinstance(samples, Histogram) or weight != "measured" or samples is None:
        seen = samples
    else:
        seen = Histogram()
        seen.add(samples)
    _check(weight, interval, derivative_weight, mean, std, seen)
    if isinstance(seen, Histogram):
        mean, std = seen.mean, seen.std
    _check_scales(config, weight, interval, mean, std)
    with np.errstate(all="ignore"):  # what is not finite is an error below
        fitted = _fitted(function, config, weight, interval, derivative_weight, mean, std, seen)
    errors = (fitted.rmse, fitted.max_error, fitted.derivative_rmse, fitted.derivative_max_error)
    if not all(map(math.isfinite, errors)) or not all(np.isfinite(p).all() for p in fitted.parameters.values()):
        raise _overflow(config, function)
    return fitted


def _overflow(config: ExpansionConfig, function: Callable[[Tensor], Tensor]) -> OrthoFxError:
    return OrthoFxError(f"the {config} fit of {name_of(function)} overflows: use a lower degree or a narrower range")


def _fitted(
    function: Callable[[Tensor], Tensor],
    config: ExpansionConfig,
    weight: str,
    interval: tuple[float, float] | None,
    derivative_weight: float,
    mean: float,
    std: float,
    seen: Tensor | Histogram | None,
) -> FittedExpansion:
    assert config.degree is not None
    basis = basis_named(config.basis)
    widest = _PANEL / 2 if basis.piecewise and config.degree > 16 else _PANEL
    points, weights, stated = _nodes(weight, interval, mean, std, seen, basis.reach, widest)
    value, slope = (part.numpy() for part in differentiated(function, torch.from_numpy(points)))
    if not (np.isfinite(value).all() and np.isfinite(slope).all()):
        lost = points[~(np.isfinite(value) & np.isfinite(slope))][0]
        raise OrthoFxError(f"{name_of(function)} or its derivative is not finite at x = {lost:g}")
    bounds = None if config.clamp is None else (mean - config.clamp * std, mean + config.clamp * std)

    # In units of the weight's own mean and deviation, z, where g(z) = f(x) / scale, or in x.
    centre, scale = 0.0, 1.0
    if basis.fits_in_units:
        centre = float(weights @ points)
        scale = math.sqrt(float(weights @ (points - centre) ** 2))
    clamped = points if bounds is None else np.clip(points, *bounds)
    problem = Problem(
        z=(clamped - centre) / scale,
        weight=weights,
        value=value / scale,
        slope=slope,
        inside=(clamped == points).astype(float),
        derivative_weight=derivative_weight / scale**2,
        standard=weight == "gaussian" and (mean, std) == (0.0, 1.0) and interval is None and bounds is None,
    )
    if config.size > (nodes := np.count_nonzero(weights)):
        raise OrthoFxError(f"a {config} fit has {config.size} coefficients for {nodes} nodes: fit fewer")
    try:
        parameters = basis.fit(problem, config.degree, config.tied)
    except (np.linalg.LinAlgError, ArithmeticError) as error:
        raise OrthoFxError(f"the {config} fit of {name_of(function)} has no solution in floats: {error}") from None
    if basis.fits_in_units:
        parameters = basis.rescale(parameters, centre, scale)

    finer, finer_weights = points, weights
    if basis.piecewise:  # the error can be larger between the nodes of the fit
        finer, finer_weights, _ = _nodes(weight, interval, mean, std, seen, basis.reach, _PANEL / 4)
    # Chebyshev points are dense at the ends, where errors are largest. They avoid round numbers, where slopes jump.
    angles = (np.arange(_POINTS) + 0.5) * (math.pi / _POINTS)
    spread = (stated[0] + stated[1] - (stated[1] - stated[0]) * np.cos(angles)) / 2
    everywhere = torch.from_numpy(np.concatenate([finer, spread]))
    exact = differentiated(function, everywhere)
    try:
        fitted = differentiated(lambda x: _evaluate(config, parameters, bounds, x), everywhere)
    except OrthoFxError:  # NaN, as infinity - infinity
        raise _overflow(config, function) from None
    errors = [(part - at).abs().numpy() for part, at in zip(fitted, exact, strict=True)]
    rmse, slope_rmse = (math.sqrt(float(finer_weights @ error[: len(finer)] ** 2)) for error in errors)
    largest, slope_largest = (float(error[len(finer) :].max()) for error in errors)
    return FittedExpansion(
        function=function,
        config=config,
        parameters=parameters,
        weight=weight,
        interval=stated,
        rmse=rmse,
        max_error=largest,
        derivative_rmse=slope_rmse,
        derivative_max_error=slope_largest,
        bounds=bounds,
    )


def check_exact(result: FittedExpansion) -> None:
    """Checks that a fit is the function itself, for init "exact".

    Raises:
        OrthoFxError: it is further off than rounding, somewhere on [-30, 30].
    """
    x = torch.linspace(-_FAR, _FAR, 4001, dtype=torch.float64)
    with torch.no_grad():
        exact = result.function(x)
        off = (result(x) - exact).abs()
    if not bool((off <= _EXACT * exact.abs().clamp(min=1.0)).all()):
        raise OrthoFxError(
            f"init 'exact': no {result.config} expansion is {name_of(result.function)}; the closest is off by "
            f"{result.max_error:.2g}. Use init 'fit' to start there, or a basis that holds this function, such as "
            "gelu_series, silu_series, relu_squared_series or piecewise_power"
        )


def _with_fit(config: ExpansionConfig) -> ExpansionConfig:
    return replace(config, init="fit")


def _check(
    weight: str,
    interval: tuple[float, float] | None,
    derivative_weight: float,
    mean: float,
    std: float,
    seen: Histogram | Tensor | None,
) -> None:
    if weight not in WEIGHTS:
        raise OrthoFxError(f"weight must be one of {', '.join(WEIGHTS)}; got {weight!r}")
    if interval is not None:
        two = isinstance(interval, tuple | list) and len(interval) == 2 and all(map(is_number, interval))
        if not two or interval[0] >= interval[1]:
            raise OrthoFxError(f"interval must be two finite numbers, the lower one first; got {interval!r}")
    if weight == "uniform" and interval is None:
        raise OrthoFxError("weight 'uniform' needs an interval")
    if not (is_number(derivative_weight) and derivative_weight >= 0):
        raise OrthoFxError(f"derivative_weight must be zero or more; got {derivative_weight}")
    if not (is_number(mean) and is_number(std) and std > 0):
        raise OrthoFxError(f"mean must be finite and std finite and above zero; got {mean!r} and {std!r}")
    if (weight == "measured") != (seen is not None):
        raise OrthoFxError("weight 'measured' needs samples, and samples need weight 'measured'")
    if isinstance(seen, Histogram):
        if not seen.samples:
            raise OrthoFxError("samples are empty")
        if not seen.finite:
            raise OrthoFxError("samples are not finite")
        if seen.constant:
            raise OrthoFxError(f"samples are constant ({seen.mean:g}): they have no scale to fit to")


def _check_scales(
    config: ExpansionConfig, weight: str, interval: tuple[float, float] | None, mean: float, std: float
) -> None:
    """Raises an `OrthoFxError` for places that float64 cannot tell apart, or whose powers it cannot hold."""
    scales: dict[str, tuple[float, float]] = {}  # by name: the width, and the largest number beside it
    if interval is not None:
        scales["interval"] = (interval[1] - interval[0], max(map(abs, interval)))
    if weight != "uniform" or config.clamp is not None:
        scales["mean and std"] = (std, max(abs(mean), std))
    if config.clamp is not None:
        scales["clamp times std"] = (config.clamp * std, max(abs(mean), config.clamp * std))
    for name, (width, largest) in scales.items():
        if not (_SMALLEST <= width and largest <= _LARGEST and width >= _APART * largest):
            raise OrthoFxError(
                f"{name} must be from {_SMALLEST:g} to {_LARGEST:g}, and at least {_APART:g} of the places' distance "
                f"from zero, for floats to tell inputs apart; got a width of {width:g} at up to {largest:g}"
            )


def _nodes(
    weight: str,
    interval: tuple[float, float] | None,
    mean: float,
    std: float,
    seen: Histogram | Tensor | None,
    reach: float,
    widest: float,
) -> tuple[Array, Array, tuple[float, float]]:
    """The points, their weights with sum 1, and the interval where errors are stated."""
    if isinstance(seen, Histogram):
        edges = seen.edges
        points = (edges[:-1] + edges[1:]) / 2
        low, high = interval or seen.interval
        filled = (seen.counts > 0) & (points >= low) & (points <= high)
        if not filled.any():
            raise OrthoFxError(f"no sample lies in the interval ({low:g}, {high:g})")
        return points[filled], seen.counts[filled] / seen.counts[filled].sum(), (low, high)
    low, high = interval or (mean - reach * std, mean + reach * std)
    wide = (high - low) / 12 if weight == "uniform" else min(std, (high - low) / 12)
    width = widest
    while width > wide / 3:
        width /= 2
    while (high - low) / width > _MOST_PANELS:
        width *= 2
    inner = width * np.arange(math.floor(low / width) + 1, math.ceil(high / width))
    edges = np.concatenate([[low], inner, [high]])
    nodes, node_weights = np.polynomial.legendre.leggauss(_NODES)
    half = np.diff(edges) / 2
    points = (edges[:-1, None] + half[:, None] * (nodes + 1)).ravel()
    weights = (half[:, None] * node_weights).ravel()
    if weight == "gaussian":
        weights = weights * np.exp(-(((points - mean) / std) ** 2) / 2)
    stated = interval or (mean - _STATED * std, mean + _STATED * std)
    return points, weights / weights.sum(), stated


def _evaluate(
    config: ExpansionConfig, parameters: Mapping[str, Array], bounds: tuple[float, float] | None, x: Tensor
) -> Tensor:
    basis = basis_named(config.basis)
    values = [torch.from_numpy(np.asarray(parameters[parameter.name])) for parameter in basis.parameters]
    prepared = basis.prepare(x.dtype, *values)[: len(values)]
    return basis.evaluate(x if bounds is None else x.clamp(*bounds), *prepared)
