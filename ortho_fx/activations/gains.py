"""`gains`: how an activation scales signals and gradients, and whether a signal's variance is stable over many layers.

For inputs N(mean, std^2) the activation is normalised to h(z) = f(mean + std z) / std with z ~ N(0, 1). Our bases have
closed forms; any other function is integrated by quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ortho_fx.activations.expansion import ExpansionActivation, make_activation
from ortho_fx.activations.gated import GatedExpansion
from ortho_fx.arguments import checked_function, is_number
from ortho_fx.bases import Basis
from ortho_fx.bases.numeric import sampled
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.moments import Array, Bounds, Moments, Values, adaptive_nodes, integrands
from ortho_fx.numerics.sampling import differentiated

# The layer map is iterated for second moments in this range, and has to come this close to its fixed point 1.
_SMALLEST, _LARGEST, _PER_DECADE = 1e-4, 1e8, 50
_LAYERS, _NEAR = 2000, 0.05

LayerMap = Callable[[float], float]


@dataclass(frozen=True)
class Gains:
    """Gains of an activation f for inputs x ~ N(mean, std^2); forward = backward = 1 preserves variance.

    Attributes:
        forward: alpha = E[f(x)^2] / std^2.
        backward: alpha' = E[f'(x)^2].
        slope: chi = d/dq of the layer map q -> E[h(sqrt(q) z)^2] at q = 1. A second moment of 1 attracts where
            |chi| < 1 and repels where |chi| > 1.
        basin: the largest second moment q, in units of std^2, such that the layer map returns to 1 (within 5 %) from
            every second moment up to q. It is inf if the map returns from all up to 1e8, and 0 if 1 is no attracting
            fixed point. A polynomial has a finite basin: signals outside of it grow without bound. The map describes
            wide layers. In a narrow layer the second moment of a sample fluctuates, and can leave the basin earlier.

    Source: the gains of arXiv 2502.01247; the slope is that of mean-field theory (Poole et al., arXiv 1606.05340).
    """

    forward: float
    backward: float
    slope: float
    basin: float


def gains(
    activation: ExpansionActivation | GatedExpansion | ExpansionConfig | Callable[[Tensor], Tensor],
    mean: float = 0.0,
    std: float = 1.0,
) -> Gains:
    """The gains of an activation f for inputs x ~ N(mean, std^2): E[f(x)^2] / std^2, E[f'(x)^2], slope and basin.

    Args:
        activation: an `ExpansionActivation` with its current parameters, read in float64; an `ExpansionConfig`, for its
            initial parameters; or any elementwise function or module that autograd differentiates (`F.gelu`,
            `nn.ReLU()`), which is called with float64 tensors. With one expansion per channel or group, moments are
            averaged over these. A `GatedExpansion` has the gains of its product f(a) b, for a of N(mean, std^2) and an
            independent b of N(0, std^2): E[(f(a) b)^2] / std^2, and the mean of the gradients' gains to a and to b.
        mean: mean of the inputs.
        std: standard deviation of the inputs, above zero.

    Returns:
        The gains, as Python floats.

    Raises:
        OrthoFxError: a mean that is not finite, a std that is not finite or not above zero, a config with init "fit"
            or "exact", or a function that returns NaN, another shape, or no gradient.

    Source: the gains of arXiv 2502.01247; the slope is that of mean-field theory (Poole et al., arXiv 1606.05340).
    """
    if not (is_number(mean) and is_number(std) and std > 0):
        raise OrthoFxError(f"mean must be finite and std finite and above zero; got {mean!r} and {std!r}")
    if isinstance(activation, ExpansionConfig):
        if activation.init in ("fit", "exact"):
            raise OrthoFxError(
                f"the gains of init {activation.init!r} depend on the function that is fitted: pass an activation"
            )
        activation = make_activation(replace(activation, granularity="layer"), dtype=torch.float64)
    if isinstance(activation, GatedExpansion):
        return _of_product(activation, mean, std)
    if isinstance(activation, ExpansionActivation):
        unit, layer_map = _of_expansion(activation, mean, std)
    else:
        unit, layer_map = _quadrature(checked_function(activation), mean, std)
    return Gains(unit.square, unit.derivative_square, unit.square_growth / 2, _basin(unit, layer_map))


def _of_product(module: GatedExpansion, mean: float, std: float) -> Gains:
    """Of h(z) w, with w ~ N(0, 1) and h = f(mean + std z): E[h^2], E[h'^2] to z and E[h^2] to w."""
    unit, layer_map = _of_expansion(module.expansion, mean, std)
    factor = std**2  # the moments are those of h / std
    forward = factor * unit.square
    product = replace(unit, square=forward, square_growth=2 * forward + factor * unit.square_growth)
    backward = (factor * unit.derivative_square + forward) / 2
    return Gains(forward, backward, product.square_growth / 2, _basin(product, lambda q: factor * q * layer_map(q)))


def _of_expansion(activation: ExpansionActivation, mean: float, std: float) -> tuple[Moments, LayerMap]:
    """The moments of h(z) = f(mean + std z) / std, and q -> E[h(sqrt(q) z)^2]."""
    basis, (groups, counts) = activation.basis, activation.distinct_values()
    bounds: Bounds | None = None if activation.bounds is None else tuple(activation.bounds.tolist())
    if not basis.closed_form:
        return _of_formula(basis, groups, counts, bounds, mean, std)

    def at(q: float) -> Moments:
        scale = std * math.sqrt(q)
        cut = None if bounds is None else ((bounds[0] - mean) / scale, (bounds[1] - mean) / scale)
        each = [astuple(basis.moments(basis.rescale(values, -mean / scale, 1 / scale), cut)) for values in groups]
        return Moments(*np.average(each, axis=0, weights=counts).tolist())

    return at(1.0), lambda q: q * at(q).square


def _of_formula(
    basis: Basis, groups: list[Values], counts: list[int], bounds: Bounds | None, mean: float, std: float
) -> tuple[Moments, LayerMap]:
    """The moments and the map of `_of_expansion`, by quadrature over all groups at once."""
    columns = {name: np.stack([values[name] for values in groups], axis=1) for name in groups[0]}
    share = np.array(counts) / sum(counts)

    def at(z: Array) -> tuple[Array, Array]:
        value, slope = sampled(basis, columns, mean + std * z, bounds)
        return value / std, slope

    def sizes(z: Array) -> tuple[Array, Array]:
        value, slope = at(z)
        return np.sqrt(value**2 @ share), np.sqrt(slope**2 @ share)

    z, weight = adaptive_nodes(sizes)
    value, slope = at(z)
    unit = Moments(*(float(weight @ each @ share) for each in integrands(z[:, None], value, slope)))
    return unit, lambda q: float(weight @ at(math.sqrt(q) * z)[0] ** 2 @ share)


def _quadrature(function: Callable[[Tensor], Tensor], mean: float, std: float) -> tuple[Moments, LayerMap]:
    """The moments and the map of `_of_expansion` for any function, by adaptive Gauss-Lobatto quadrature.

    The quadrature reaches 12 standard deviations to either side of the mean.
    """

    def at(z: Array) -> tuple[Array, Array]:
        value, slope = differentiated(function, mean + std * torch.from_numpy(z))
        return value.numpy() / std, slope.numpy()

    z, weight = adaptive_nodes(at)
    unit = Moments(*(float(weight @ each) for each in integrands(z, *at(z))))
    nodes, weights = torch.from_numpy(z), torch.from_numpy(weight)

    def layer_map(q: float) -> float:
        with torch.no_grad():
            return float(weights @ (function(mean + std * math.sqrt(q) * nodes) / std).square())

    return unit, layer_map


def _basin(unit: Moments, layer_map: LayerMap) -> float:
    if not (abs(unit.square - 1) < _NEAR and abs(unit.square_growth) < 2):
        return 0.0
    grid = np.geomspace(_SMALLEST, _LARGEST, round(_PER_DECADE * math.log10(_LARGEST / _SMALLEST)) + 1)
    with np.errstate(all="ignore"):
        image = np.array([layer_map(float(q)) for q in grid])
    image = np.where(np.isfinite(image), image, np.inf)
    returns = _returns(grid, image)
    if returns.all():
        return math.inf
    above = np.flatnonzero(~returns & (grid > 1))
    below = np.flatnonzero(~returns & (grid <= 1))
    if len(below):
        return 0.0
    return float(grid[above[0] - 1])


def _returns(grid: Array, image: Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether the layer map, interpolated in logarithms, converges to 1 from each second moment of the grid."""
    log_grid, log_image = np.log(grid), np.log(np.clip(image, 1e-300, 1e300))
    q = log_grid.copy()
    for _ in range(_LAYERS):
        q = np.interp(q, log_grid, log_image)
    return np.abs(q) < _NEAR
