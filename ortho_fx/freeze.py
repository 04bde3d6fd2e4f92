"""`freeze_`: expansions that are done learning, in the cheapest form that equals them, with constants folded.

What each basis becomes:
- Hermite: the same polynomial in powers of x by Horner's rule, one multiply-add a degree, where that rounds about as
  little as the recurrence does; else Clenshaw's recurrence, with the factorials in its coefficients: two a degree.
  Leading coefficients that are zero are dropped.
- Fourier: a_0 + sum of A_k cos(w_k x - p_k) with A_k = a_k / k!. Waves of equal frequency become one, those of
  frequency zero join the constant, and those below rounding are dropped: of 64 equal ones in float32 14 remain. With
  tied frequencies, the same as a sum of A_k cos(k w x) + B_k sin(k w x), which takes one cosine and one sine.
- tropical: the pieces that are the maximum somewhere, or somewhere within the clamp. A maximum of one line is a
  polynomial, and a denominator of one line is subtracted from the numerator's.

Everything is decided and folded in float64. With one expansion a channel or group, each keeps what it needs, and all
are as long as the longest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn

from ortho_fx.activations import ExpansionActivation, channel_dim_of, refuse_scripting
from ortho_fx.bases.fourier import harmonics
from ortho_fx.errors import OrthoFxError
from ortho_fx.moments import Array, Values, wave_frequencies
from ortho_fx.passes.expansions import Expansion

# A form by name and its constants by name, each of shape (terms, groups).
Folded = tuple[str, dict[str, Array]]
Interval = tuple[float, float]

# Horner's rule replaces the recurrence where its rounding error is at most so many times that of the recurrence.
_HORNER_ERROR = 4.0
# Clenshaw's recurrence runs in x / 8: the folded coefficients of all degrees then keep within 1e4 of one another.
_STEP = 0.125


def freeze_(model: nn.Module) -> tuple[str, ...]:
    """Replaces the expansions of a model by fixed functions that equal them at less cost, in place.

    Expansions that the model shares stay shared. What is frozen has no parameters: freeze after training, for
    inference. A second call finds nothing more to do.

    Args:
        model: a model that `rewrite_` or the compile backend has been over.

    Returns:
        The qualified names of the expansions that were frozen, a shared one under its first.

    Raises:
        OrthoFxError: a model without expansions, one that is itself an expansion, or parameters that have no values
            or are not finite. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> report = rewrite_(model, ExpansionConfig(basis="hermite", degree=3))
        >>> freeze_(model)
        ('1',)
        >>> model[1]
        FrozenExpansion(hermite 3, form='polynomial', terms=4)
    """
    modules = dict(model.named_modules())
    if isinstance(model, ExpansionActivation):
        raise OrthoFxError(f"the model itself is the {type(model).__name__}, and nothing holds it: freeze what does")
    if not any(isinstance(module, OURS) for module in modules.values()):
        raise OrthoFxError(f"{type(model).__name__} holds no expansion to freeze: call rewrite_ first")
    names, frozen = [], {}
    for name, module in modules.items():
        if isinstance(module, ExpansionActivation):
            try:
                frozen[module] = FrozenExpansion(module)
            except OrthoFxError as error:
                raise OrthoFxError(f"{name}: {error}") from None
            names.append(name)
    for owner in modules.values():
        for key, child in owner._modules.items():
            if isinstance(child, ExpansionActivation):
                owner._modules[key] = frozen[child]
    return tuple(names)


class FrozenExpansion(Expansion):
    """The function of an expansion, in the cheapest form that equals it. Made by `freeze_`.

    Form and constants, of shape (terms,), or (terms, channels) with one expansion a channel or group:
    - "polynomial": sum of c_k x^k, k = 0 .. terms - 1; `monomial_coefficients`.
    - "recurrence": sum of a_k He_k(x) / k!; `hermite_coefficients`, which are a_k 8^k / k!.
    - "waves": a_0 + sum of A_k cos(w_k x - p_k); `constant`, `amplitudes`, `frequencies`, `phases`.
    - "harmonics": a_0 + sum of A_k cos(k w x) + B_k sin(k w x); `constant`, `cosine_amplitudes`, `sine_amplitudes`,
      and w as `frequencies`.
    - "maximum": max over k of (s_k x + b_k); `slopes`, `offsets`.
    - "difference": such a maximum less another; `denominator_slopes` and `denominator_offsets` besides.

    The constants are buffers, of the device and dtype that the parameters had, but in float32 where that was half
    precision, and they stay so when the model is cast to that. A state dict loads where form and sizes agree.

    Shape: input `(*)` of any floating dtype, output `(*)` of the same dtype, in the arithmetic of the expansion:
    float32 inside for half precision, and at most +-65504 in float16. Derivatives of every order are autograd's, which
    keeps intermediate results where the expansion keeps its input alone, unless it is compiled.

    Rounding: the first-order bound on the error of Horner's rule is at most 4 times that of the recurrence, on the
    whole line or within the clamp. Waves left out add less than the rounding of the others to value, slope and second
    derivative. At an input within rounding of a knot, the gradient can be that of a piece beside.

    Args:
        expansion: what to freeze; it is left as it is.

    Raises:
        OrthoFxError: parameters without values or not finite; at the call, what an expansion raises.
    """

    bounds: Tensor | None

    def __init__(self, expansion: ExpansionActivation) -> None:
        super().__init__()
        if type(expansion).forward is not ExpansionActivation.forward:
            raise OrthoFxError("it is still annealed: call finish() of its Annealing before freeze_")
        self.config, self.channels, self.channel_dim = expansion.config, expansion.channels, expansion.channel_dim
        if hasattr(expansion, "_replaced"):  # what stood here before the expansion
            self._replaced = expansion._replaced
        first = getattr(expansion, expansion.basis.parameters[0].name)
        dtype = _at_least_float32(first.dtype)
        values, interval = _finite_values(expansion)
        self.form, constants = _FOLD[expansion.basis.name](values, interval, dtype)
        for name, value in constants.items():
            if self.channels is None:
                value = value[:, 0]
            else:
                value = value.repeat(self.channels // value.shape[1], axis=1)
            self.register_buffer(name, torch.from_numpy(value).to(first.device, dtype))
        self._constants = tuple(constants)
        bounds = expansion.bounds
        self.register_buffer("bounds", None if bounds is None else bounds.detach().to(dtype, copy=True))
        self.train(expansion.training)

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """As that of the expansion."""
        if isinstance(x, fx.Proxy):
            raise OrthoFxError("torch.fx cannot trace a FrozenExpansion: trace before freeze_, or use torch.export")
        if not x.is_floating_point():
            raise OrthoFxError(f"{type(self).__name__} takes a floating-point tensor; got {x.dtype}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        constants = [getattr(self, name).to(dtype) for name in self._constants]
        if self.channels is not None:
            dim = channel_dim_of(self, x)
            behind = (1,) * (x.dim() - 1 - dim % x.dim())
            constants = [constant.reshape(*constant.shape, *behind) for constant in constants]
        z = x if self.bounds is None else x.clamp(self.bounds[0], self.bounds[1])
        y = _EVALUATE[self.form](z.to(dtype), *constants)
        if x.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            y = y.clamp(-largest, largest)
        return y.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenExpansion:
        def moved(constant: Tensor) -> Tensor:
            result = fn(constant)
            return result if _at_least_float32(result.dtype) == result.dtype else constant.to(result.device)

        return super()._apply(moved, recurse)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_scripting(self)

    def extra_repr(self) -> str:
        counted = [name for name in self._constants if name.endswith(("coefficients", "offsets")) or name in _COUNTED]
        terms = " - ".join(str(len(getattr(self, name))) for name in counted)
        shown = f"{self.config}, form={self.form!r}, terms={terms}"
        return shown if self.channels is None else f"{shown}, channels={self.channels}"


# Of a form's constants, those whose length is its number of terms, beside coefficients and offsets.
_COUNTED = ("amplitudes", "cosine_amplitudes")
# What stands in the place of an activation already.
OURS = (ExpansionActivation, FrozenExpansion)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _finite_values(expansion: ExpansionActivation) -> tuple[dict[str, Array], Interval | None]:
    """The parameters in float64, each of shape (size, groups), and the interval of the clamp."""
    names = [parameter.name for parameter in expansion.basis.parameters]
    values = {}
    for name in names if expansion.bounds is None else (*names, "bounds"):
        tensor = getattr(expansion, name).detach()
        if tensor.is_meta:
            raise OrthoFxError(f"{name} is on the meta device, and has no values to freeze")
        if not tensor.isfinite().all():
            raise OrthoFxError(f"{name} has values that are not finite")
        values[name] = tensor.to("cpu", torch.float64).numpy().reshape(len(tensor), -1)
    if expansion.bounds is None:
        return values, None
    # Half-precision inputs are clamped to the bounds as their dtype rounds them.
    low, high = (float(bound) for bound in values.pop("bounds")[:, 0])
    margin = torch.finfo(torch.bfloat16).eps
    return values, (low - margin * abs(low), high + margin * abs(high))


def _polynomial(x: Tensor, coefficients: Tensor) -> Tensor:
    *lower, highest = coefficients.unbind()
    y = lower[-1] + x * highest
    for coefficient in reversed(lower[:-1]):
        y = torch.addcmul(coefficient, y, x)
    return y


def _recurrence(x: Tensor, coefficients: Tensor) -> Tensor:
    """Clenshaw's: y is d_0 of d_k = c_k + (x h) d_{k+1} - (k + 1) h^2 d_{k+2}, with c_k = a_k / (k! h^k)."""
    scaled = x * _STEP
    *lower, after = coefficients.unbind()
    y = lower[-1] + scaled * after
    for k in range(len(lower) - 2, -1, -1):
        after, y = y, torch.addcmul(torch.add(lower[k], after, alpha=-(k + 1) * _STEP**2), y, scaled)
    return y


def _waves(x: Tensor, constant: Tensor, amplitudes: Tensor, frequencies: Tensor, phases: Tensor) -> Tensor:
    y = constant[0]
    for amplitude, frequency, phase in zip(amplitudes.unbind(), frequencies.unbind(), phases.unbind(), strict=True):
        y = torch.addcmul(y, amplitude, torch.cos((x * frequency).sub_(phase)))
    return y


def _maximum(x: Tensor, slopes: Tensor, offsets: Tensor) -> Tensor:
    lines = zip(slopes.unbind(), offsets.unbind(), strict=True)
    return functools.reduce(torch.maximum, ((x * slope).add_(offset) for slope, offset in lines))


def _difference(x: Tensor, slopes: Tensor, offsets: Tensor, down: Tensor, below: Tensor) -> Tensor:
    return _maximum(x, slopes, offsets) - _maximum(x, down, below)


_EVALUATE: dict[str, Callable[..., Tensor]] = {
    "polynomial": _polynomial,
    "recurrence": _recurrence,
    "waves": _waves,
    "harmonics": harmonics,
    "maximum": _maximum,
    "difference": _difference,
}


def _fold_hermite(values: Values, interval: Interval | None, dtype: torch.dtype) -> Folded:
    a = values["coefficients"]
    degree = max(int(np.flatnonzero(a.any(axis=1)).max(initial=1)), 1)
    a = a[: degree + 1]
    monomials = _monomials(degree)
    c = monomials @ a
    if interval is None:
        sizes = np.logspace(-3, 3, 241)
        x = np.concatenate([-sizes, [0.0], sizes])
    else:
        x = np.linspace(*interval, 401)
    # c is off by its summation in float64, and by being stored, where what is too small for the dtype is lost.
    limits = torch.finfo(dtype)
    stored = np.where(np.abs(c) < limits.tiny, 0.0, torch.from_numpy(c).to(dtype).double().numpy())
    off = (np.abs(monomials) @ np.abs(a) * np.finfo(np.float64).eps + np.abs(c - stored)) / (limits.eps / 2)
    if (_horner_error(c, x) + _sum_of_powers(off, x) <= _HORNER_ERROR * _recurrence_error(a, x)).all():
        return "polynomial", {"monomial_coefficients": c}
    weights = [1.0 / (math.factorial(k) * _STEP**k) for k in range(degree + 1)]
    return "recurrence", {"hermite_coefficients": a * np.array(weights)[:, None]}


def _monomials(degree: int) -> Array:
    """The coefficients of x^j in He_k / k!, in row j and column k: (-1)^m / (m! j! 2^m) with m = (k - j) / 2."""
    table = np.zeros((degree + 1, degree + 1))
    for k in range(degree + 1):
        for m in range(k // 2 + 1):
            table[k - 2 * m, k] = (-1) ** m / (math.factorial(m) * math.factorial(k - 2 * m) * 2**m)
    return table


def _sum_of_powers(sizes: Array, x: Array) -> Array:
    """sum_j sizes_j |x|^j, of shape (points, groups)."""
    return np.abs(x)[:, None] ** np.arange(len(sizes)) @ sizes


def _horner_error(c: Array, x: Array) -> Array:
    """What Horner's rule is off by at most, to first order and in units of half an eps, of shape (points, groups)."""
    error = np.zeros((len(x), c.shape[1]))
    partial = np.broadcast_to(c[-1], error.shape)
    for j in range(len(c) - 2, -1, -1):
        product = x[:, None] * partial
        partial = product + c[j]
        # To add zero is exact.
        error += (np.abs(product) + np.where(c[j] == 0, 0.0, np.abs(partial))) * np.abs(x)[:, None] ** j
    return error


def _recurrence_error(a: Array, x: Array) -> Array:
    """The same of the three-term recurrence, for P_k = He_k / k!."""
    x = x[:, None]
    p = [np.ones_like(x), x]
    for k in range(2, len(a)):
        p.append((x * p[-1] - p[-2]) / k)
    error = np.zeros((len(x), a.shape[1]))
    total = np.zeros_like(error)
    for k in range(len(a)):
        term = a[k] * p[k]
        total += term
        error += np.abs(term) + np.abs(total)
    # A rounding error in P_k changes the result by Clenshaw's sum b_k = a_k + x b_{k+1} / (k + 1) - b_{k+2} / (k + 2).
    after, later = np.zeros_like(error), np.zeros_like(error)
    for k in range(len(a) - 1, 1, -1):
        after, later = a[k] + x * after / (k + 1) - later / (k + 2), after
        error += np.abs(after) * (np.abs(x * p[k - 1]) / k + 2 * np.abs(p[k]))
    return error


def _fold_fourier(values: Values, interval: Interval | None, dtype: torch.dtype) -> Folded:
    constant, w = values["constant"].copy(), wave_frequencies(values)
    a = values["coefficients"] / np.array([float(math.factorial(k + 1)) for k in range(len(w))])[:, None]
    if len(values["frequencies"]) < len(w):
        return _fold_tied(constant, a, w, values["phases"], dtype)
    # cos(w x - p) is even: of frequencies w and -w, the one with the sign changed is the same wave.
    w, p = np.abs(w), np.where(w < 0, -values["phases"], values["phases"])
    constant += np.where(w == 0, a * np.cos(p), 0.0).sum(axis=0)
    a = np.where(w == 0, 0.0, a)
    for k in range(1, len(w)):
        for j in range(k):
            equal = (w[j] == w[k]) & (a[j] != 0) & (a[k] != 0)
            if equal.any():
                phasor = a[j] * np.exp(1j * p[j]) + a[k] * np.exp(1j * p[k])
                a[j], p[j] = np.where(equal, np.abs(phasor), a[j]), np.where(equal, np.angle(phasor), p[j])
                a[k] = np.where(equal, 0.0, a[k])
    needed = _above_rounding(constant, a, w, dtype)
    if not needed.any():
        return "polynomial", {"monomial_coefficients": np.concatenate([constant, np.zeros_like(constant)])}
    present, a, w, p = _packed(needed, a, w, p)
    return "waves", {"constant": constant, "amplitudes": np.where(present, a, 0.0), "frequencies": w, "phases": p}


def _fold_tied(constant: Array, a: Array, w: Array, p: Array, dtype: torch.dtype) -> Folded:
    cosines, sines = a * np.cos(p), a * np.sin(p)
    constant += np.where(w == 0, cosines, 0.0).sum(axis=0)
    needed = _above_rounding(constant, np.where(w == 0, 0.0, a), np.abs(w), dtype)
    if not needed.any():
        return "polynomial", {"monomial_coefficients": np.concatenate([constant, np.zeros_like(constant)])}
    kept = slice(np.flatnonzero(needed.any(axis=1)).max() + 1)
    return "harmonics", {
        "constant": constant,
        "cosine_amplitudes": np.where(needed, cosines, 0.0)[kept],
        "sine_amplitudes": np.where(needed, sines, 0.0)[kept],
        "frequencies": w[:1],
    }


def _above_rounding(constant: Array, a: Array, w: Array, dtype: torch.dtype) -> Any:
    """Which waves count beside the others in value, slope or second derivative."""
    needed = np.zeros(w.shape, dtype=bool)
    for order in range(3):
        sizes = np.abs(a) * w**order
        total = sizes.sum(axis=0) + (np.abs(constant) if order == 0 else 0.0)
        needed |= sizes * len(w) > total * (torch.finfo(dtype).eps / 8)
    return needed


def _packed(needed: Any, *arrays: Array) -> list[Any]:
    """The needed rows of each column, in order and filled up with the first of them, behind the mask of the needed."""
    order = np.argsort(~needed, axis=0, kind="stable")[: needed.sum(axis=0).max()]
    present = np.take_along_axis(needed, order, axis=0)
    taken = [np.take_along_axis(array, order, axis=0) for array in arrays]
    return [present, *(np.where(present, rows, rows[:1]) for rows in taken)]


def _upper_envelope(slopes: Array, offsets: Array, interval: Interval | None) -> tuple[Array, Array]:
    """The slopes and offsets of the pieces that alone are the maximum on some stretch of the interval."""
    lowest, highest = (-math.inf, math.inf) if interval is None else interval
    needed = np.zeros(slopes.shape, dtype=bool)
    for k in range(len(slopes)):
        steeper = slopes - slopes[k]
        # Line j passes line k at this x: from there on it is above where it is steeper, and until there where flatter.
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = (offsets[k] - offsets) / steeper
        start = np.where(steeper < 0, crossing, -math.inf).max(axis=0)
        end = np.where(steeper > 0, crossing, math.inf).min(axis=0)
        higher = offsets > offsets[k]
        higher[:k] |= offsets[:k] == offsets[k]
        needed[k] = (np.maximum(start, lowest) < np.minimum(end, highest)) & ~(higher & (steeper == 0)).any(axis=0)
    if interval is not None:  # one that is a point has no stretches
        top = (slopes * highest + offsets).argmax(axis=0)
        needed[top, np.arange(len(top))] |= ~needed.any(axis=0)
    _, slopes, offsets = _packed(needed, slopes, offsets)
    return slopes, offsets


def _fold_tropical(values: Values, interval: Interval | None, dtype: torch.dtype) -> Folded:
    slopes, offsets = _upper_envelope(values["slopes"], values["offsets"], interval)
    return _maximum_or_line(slopes, offsets)


def _maximum_or_line(slopes: Array, offsets: Array) -> Folded:
    if len(slopes) == 1:
        return "polynomial", {"monomial_coefficients": np.concatenate([offsets, slopes])}
    return "maximum", {"slopes": slopes, "offsets": offsets}


def _fold_tropical_rational(values: Values, interval: Interval | None, dtype: torch.dtype) -> Folded:
    slopes, offsets = _upper_envelope(values["slopes"], values["offsets"], interval)
    down, below = _upper_envelope(values["denominator_slopes"], values["denominator_offsets"], interval)
    if len(down) == 1:
        return _maximum_or_line(slopes - down, offsets - below)
    constants = {"slopes": slopes, "offsets": offsets, "denominator_slopes": down, "denominator_offsets": below}
    return "difference", constants


_FOLD: dict[str, Callable[[Values, Interval | None, torch.dtype], Folded]] = {
    "hermite": _fold_hermite,
    "fourier": _fold_fourier,
    "tropical": _fold_tropical,
    "tropical_rational": _fold_tropical_rational,
}
