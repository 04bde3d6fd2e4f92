"""Fourier expansions, y(x) = a_0 + sum_{k=1..n} a_k cos(w_k x - p_k) / k!, with learnable frequencies and phases.

Tied frequencies, w_k = k w, are stored as the one number w. All waves then follow from cos(w x) and sin(w x) by angle
addition: a_k cos(k w x - p_k) / k! is A_k cos(k w x) + B_k sin(k w x) with A_k = a_k cos(p_k) / k! and
B_k = a_k sin(p_k) / k!. A_k and B_k are computed once for all x.

In the frozen form, waves of equal frequency are merged, waves of frequency zero are added to the constant, and waves
below rounding are dropped: of 64 waves with equal coefficients, 14 remain in float32. With tied frequencies the frozen
form is the sum of A_k cos(k w x) + B_k sin(k w x), which computes only one cosine and one sine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ortho_fx.bases.basis import Basis
from ortho_fx.bases.folded import Folded, circle, constant_polynomial, harmonics, packed
from ortho_fx.bases.formula import (
    TURNS,
    Parameter,
    Term,
    Together,
    TorchorthoState,
    Value,
    counts_turns,
    multiply_add,
    renamed,
)
from ortho_fx.bases.fourier_fit import fit_waves
from ortho_fx.bases.hermite import factorial_weights
from ortho_fx.bases.numeric import sampled
from ortho_fx.bases.stable import stable
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.least_squares import Problem
from ortho_fx.numerics.moments import Array, Bounds, Moments, Values, clamped


def _inverse_factorial(k: int) -> float:
    return 1.0 / math.factorial(k)


def _orders(like: Tensor) -> Tensor:
    """k = 1, 2, ... for each row of a tensor, on its device, in float64."""
    return torch.arange(1, like.shape[0] + 1, dtype=torch.float64, device=like.device)


def _for_rows(numbers: Tensor, of: Tensor) -> Tensor:
    """One number for each row of a tensor, in its dtype, to multiply it by."""
    return numbers.to(of.dtype).reshape(-1, *(1 for _ in of.shape[1:]))


def _inverse_factorials(like: Tensor) -> Tensor:
    """1 / k! for k = 1, 2, ..., along the first dimension of a tensor, on its device."""
    return _for_rows(torch.exp(-torch.lgamma(_orders(like) + 1)), of=like)


def torchortho_parameters(state: Mapping[str, Tensor], tied: bool = False) -> dict[str, Tensor]:
    """Converts FourierActivation: y(x) = fundamental + sum of coefficients_k cos(grid_k x - phases_k) / k!, from k = 1.

    `normalization_term` is k!.

    Raises:
        OrthoFxError: the expansion ties its frequencies, and the state's are no multiples of one number.
    """
    names = ("coefficients", "phases")
    parameters = renamed(state, {"fundamental": "constant", "grid": "frequencies", **{name: name for name in names}})
    if tied and "frequencies" in parameters:
        parameters["frequencies"] = _fundamental(parameters["frequencies"])
    return parameters


def _fundamental(frequencies: Tensor) -> Tensor:
    multiples = torch.arange(1, len(frequencies) + 1, device=frequencies.device) * frequencies[:1]
    if not torch.allclose(frequencies, multiples.to(frequencies.dtype), rtol=1e-6, atol=0.0):
        raise OrthoFxError("grid: the frequencies are no multiples of the first: load them with tied=False")
    return frequencies[:1]


class Fourier(Basis):
    colour = "#009E73"
    torchortho = TorchorthoState(
        "FourierActivation",
        "fundamental",
        torchortho_parameters,
        frozenset({"fundamental", "coefficients", "grid", "phases", "normalization_term", "act_init"}),
    )
    closed_form = True
    reach = 8.0
    fits_in_units = True

    def prepare(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        """For tied frequencies: the constant, A, B and w."""
        constant, coefficients, frequencies, phases = parameters
        if len(frequencies) == len(coefficients):
            return parameters
        coefficients, phases = coefficients.to(dtype), phases.to(dtype)
        weights = coefficients * _inverse_factorials(coefficients)
        # As one tensor: AOTAutograd saves the result of a concatenation for the backward pass, and never recomputes it.
        cosines, sines = torch.stack([weights * phases.cos(), weights * phases.sin()]).unbind()
        return constant, cosines, sines, frequencies

    def prepare_for_kernels(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        """In float32, unless frequencies are tied: a_0, a_k / k!, w_k in turns and -p_k in turns.

        So a wave costs one operation less, and its angle is rounded once.
        """
        prepared = self.prepare(dtype, *parameters)
        if dtype != torch.float32 or len(prepared[3]) < len(prepared[1]):
            return prepared
        constant, *others = prepared
        coefficients, frequencies, phases = (p.to(dtype) for p in others)
        # As one tensor: AOTAutograd saves the result of a concatenation for the backward pass, and never recomputes it.
        rows = coefficients * _inverse_factorials(coefficients), frequencies * TURNS, phases * -TURNS
        return constant, *torch.stack(rows).unbind()

    def evaluate(self, x: Value, *parameters: Value) -> Value:
        if len(parameters[3]) < len(parameters[1]):
            return harmonics(x, *parameters)
        waves = _Waves(x, *parameters)
        y = parameters[0][0]
        for k in range(waves.count):
            y = multiply_add(waves.weight(k), waves.cosine(waves.angle(k)), y)
        return y

    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        if len(parameters[3]) < len(parameters[1]):
            return _harmonic_derivatives(grad, x, *parameters)
        waves = _Waves(x, *parameters)
        # These caches end with the call: what they hold is as large as x.
        angle = functools.cache(waves.angle)
        sine = functools.cache(lambda k: waves.sine(angle(k)))

        def grad_x() -> Value:
            # d/dx a cos(w x - p) = -a w sin(w x - p)
            slope = waves.rate(0) * sine(0)
            for k in range(1, waves.count):
                slope = multiply_add(waves.rate(k), sine(k), slope)
            return grad * (slope * waves.unit)

        return grad_x, [
            lambda: grad,
            *(lambda k=k: grad * waves.cosine(angle(k)) for k in range(waves.count)),
            *(lambda k=k: grad * sine(k) for k in range(waves.count)),
            *(lambda k=k: grad * sine(k) * x for k in range(waves.count)),
        ]

    def slope(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """d/dx cos(w x - p) = w cos(w x - (p - pi / 2))."""
        constant, coefficients, frequencies, phases = parameters
        w = frequencies
        if len(w) < len(coefficients):
            w = w * _for_rows(_orders(coefficients), of=coefficients)
        return torch.zeros_like(constant), coefficients * w, frequencies, phases - math.pi / 2

    def together(self, x: Tensor, *parameters: Tensor) -> Together | None:
        constant, coefficients, frequencies, phases = parameters
        if len(phases) < len(coefficients):  # tied frequencies, prepared
            return None
        weights = coefficients * _inverse_factorials(coefficients)
        angles = frequencies * x - phases
        # These caches end with the call.
        sines = functools.cache(angles.sin)
        return Together(
            lambda: constant[0] + (weights * angles.cos()).sum(0),
            lambda: (weights * -frequencies * sines()).sum(0),
            lambda: torch.cat([torch.ones_like(angles[:1]), angles.cos(), sines(), sines() * x]),
        )

    def collect(self, sums: Tensor, *parameters: Tensor) -> Sequence[Tensor]:
        _, coefficients, frequencies, phases = parameters
        degree = coefficients.shape[0]
        factors = _inverse_factorials(coefficients)
        if len(frequencies) < degree:
            constant, cosines, sines, frequency = sums.split([1, degree, degree, 1])
            c, s = factors * phases.cos(), factors * phases.sin()
            return constant, c * cosines + s * sines, frequency, coefficients * (c * sines - s * cosines)
        constant, others = sums.split([1, 3 * degree])
        # One product for all gradients. The factors are computed on the device of the sums: 1 / k! for coefficients,
        # a_k / k! for phases, and -a_k / k! for frequencies.
        others = others.unflatten(0, (3, degree))
        row = torch.arange(3, device=sums.device).reshape(3, *(1 for _ in sums.shape))
        factors = torch.where(row == 0, factors, torch.where(row == 1, factors * coefficients, -factors * coefficients))
        coefficients, phases, frequencies = (others * factors).unbind()
        return constant, coefficients, frequencies, phases

    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments:
        if bounds is None:
            return _moments(values)
        return clamped(lambda x: sampled(self, values, x), bounds, float(np.abs(wave_frequencies(values)).max()))

    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """Sines (phases pi / 2) with frequencies 0.35 k, scaled and shifted to gains of 1."""
        return stable(self, _waves(degree, 0.35, math.pi / 2, tied), bounds)

    def paper_start(self, degree: int, tied: bool = False) -> dict[str, Array]:
        constant, scale = factorial_weights(degree, 2)
        return {
            **_waves(degree, 1.0, math.pi / 4, tied),
            "constant": np.array([scale * constant]),
            "coefficients": np.full(degree, scale),
        }

    def affine(self, values: Values, scale: float, shift: float) -> dict[str, Array]:
        scaled = {name: scale * values[name] for name in ("constant", "coefficients")}
        scaled["constant"][0] += shift
        return {**values, **scaled}

    def straightened(self, values: Values, share: float, slope: float) -> dict[str, Array]:
        """y(share x) / share: waves are no lines, but slow ones come close to lines."""
        return self.rescale(values, 0.0, 1 / share)

    def rescale(self, values: Values, mean: float, std: float) -> dict[str, Array]:
        """Exact: it changes frequencies and phases."""
        return {
            "constant": std * values["constant"],
            "coefficients": std * values["coefficients"],
            "frequencies": values["frequencies"] / std,
            "phases": values["phases"] + wave_frequencies(values) * (mean / std),
        }

    def fit(self, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
        return fit_waves(problem, degree, tied)

    def fold(self, values: Values, interval: Bounds | None, dtype: torch.dtype) -> Folded:
        return _fold(values, dtype)


class _Waves:
    """The waves cos(w_k x - p_k) and their weights a_k / k!, of the numbers that `prepare` or its twin gives.

    `unit` times `rate(k)` is the factor of sine k in the slope.
    """

    def __init__(self, x: Value, constant: Value, coefficients: Value, frequencies: Value, phases: Value) -> None:
        self._x, self._coefficients, self._frequencies, self._phases = x, coefficients, frequencies, phases
        self._turns = counts_turns(x)
        self.count = len(coefficients)
        self.unit = -2.0 * math.pi if self._turns else -1.0

    def weight(self, k: int) -> Value:
        return self._coefficients[k] if self._turns else self._coefficients[k] * _inverse_factorial(k + 1)

    def rate(self, k: int) -> Value:
        return self.weight(k) * self._frequencies[k]

    def angle(self, k: int) -> Value:
        if self._turns:
            return multiply_add(self._frequencies[k], self._x, self._phases[k])
        return self._frequencies[k] * self._x - self._phases[k]

    def cosine(self, angle: Value) -> Value:
        return angle.cos_of_turns() if self._turns else angle.cos()

    def sine(self, angle: Value) -> Value:
        return angle.sin_of_turns() if self._turns else angle.sin()


def _harmonic_derivatives(
    grad: Value, x: Value, constant: Value, cosines: Value, sines: Value, frequency: Value
) -> tuple[Term, list[Term]]:
    degree = len(cosines)

    @functools.cache
    def waves() -> list[tuple[Value, Value]]:
        """grad cos(k w x) and grad sin(k w x)."""
        c, s = circle(x, frequency)
        minus_s = s * -1.0
        pairs = [(grad * c, grad * s)]
        for _ in range(degree - 1):
            p, q = pairs[-1]
            pairs.append((multiply_add(q, minus_s, p * c), multiply_add(q, c, p * s)))
        return pairs

    @functools.cache
    def slope() -> Value:
        """grad times the derivative with respect to the angle w x: sum of k (B_k cos(k w x) - A_k sin(k w x))."""
        pairs = waves()
        # The total of all partial sums contains wave k k times: it is in k of them.
        partial = total = sines[degree - 1] * pairs[-1][0] - cosines[degree - 1] * pairs[-1][1]
        for k in range(degree - 2, -1, -1):
            partial = multiply_add(sines[k], pairs[k][0], partial) - cosines[k] * pairs[k][1]
            total = total + partial
        return total

    return lambda: frequency[0] * slope(), [
        lambda: grad,
        *(lambda k=k: waves()[k][0] for k in range(degree)),
        *(lambda k=k: waves()[k][1] for k in range(degree)),
        lambda: slope() * x,
    ]


def _waves(degree: int, fundamental: float, phase: float, tied: bool) -> dict[str, Array]:
    return {
        "constant": np.zeros(1),
        "coefficients": np.ones(degree),
        "frequencies": fundamental * np.arange(1.0, (1 if tied else degree) + 1),
        "phases": np.full(degree, phase),
    }


def _moments(values: Values) -> Moments:
    # E cos(u X - v) = cos(v) exp(-u^2 / 2), and E[(X^2 - 1) cos(u X - v)] is -u^2 times that.
    a0 = float(np.asarray(values["constant"])[0])
    w = np.asarray(wave_frequencies(values), dtype=np.float64)
    p = np.asarray(values["phases"], dtype=np.float64)
    a = np.asarray(values["coefficients"]) * np.exp([-math.lgamma(k + 2) for k in range(len(w))])

    def expected(u: Array, v: Array) -> Array:
        return np.cos(v) * np.exp(-(u**2) / 2)

    single = a * expected(w, p)
    pairs = np.outer(a, a) / 2
    minus, plus = np.subtract.outer(w, w), np.add.outer(w, w)
    cos_minus = expected(minus, np.subtract.outer(p, p))
    cos_plus = expected(plus, np.add.outer(p, p))
    wave_square = float((pairs * (cos_minus + cos_plus)).sum())
    wave_growth = -float((pairs * (minus**2 * cos_minus + plus**2 * cos_plus)).sum())
    mean_growth = -float((w**2 * single).sum())
    wave = float(single.sum())
    return Moments(
        mean=a0 + wave,
        square=a0**2 + 2 * a0 * wave + wave_square,
        derivative_square=float((pairs * np.outer(w, w) * (cos_minus - cos_plus)).sum()),
        mean_growth=mean_growth,
        square_growth=2 * a0 * mean_growth + wave_growth,
    )


def wave_frequencies(values: Values) -> Array:
    """The frequency of each wave of a Fourier expansion, tied or not."""
    frequencies, degree = np.asarray(values["frequencies"]), len(values["coefficients"])
    return frequencies if len(frequencies) == degree else np.multiply.outer(np.arange(1.0, degree + 1), frequencies[0])


def _fold(values: Values, dtype: torch.dtype) -> Folded:
    constant, w = values["constant"].copy(), wave_frequencies(values)
    a = values["coefficients"] / np.array([float(math.factorial(k + 1)) for k in range(len(w))])[:, None]
    if len(values["frequencies"]) < len(w):
        return _fold_tied(constant, a, w, values["phases"], dtype)
    # cos(w x - p) = cos(-w x + p): a wave of frequency -w is one of frequency w with the opposite phase.
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
        return constant_polynomial(constant)
    present, a, w, p = packed(needed, a, w, p)
    return "waves", {"constant": constant, "amplitudes": np.where(present, a, 0.0), "frequencies": w, "phases": p}


def _fold_tied(constant: Array, a: Array, w: Array, p: Array, dtype: torch.dtype) -> Folded:
    cosines, sines = a * np.cos(p), a * np.sin(p)
    constant += np.where(w == 0, cosines, 0.0).sum(axis=0)
    needed = _above_rounding(constant, np.where(w == 0, 0.0, a), np.abs(w), dtype)
    if not needed.any():
        return constant_polynomial(constant)
    kept = slice(np.flatnonzero(needed.any(axis=1)).max() + 1)
    return "harmonics", {
        "constant": constant,
        "cosine_amplitudes": np.where(needed, cosines, 0.0)[kept],
        "sine_amplitudes": np.where(needed, sines, 0.0)[kept],
        "frequencies": w[:1],
    }


def _above_rounding(constant: Array, a: Array, w: Array, dtype: torch.dtype) -> NDArray[np.bool_]:
    """Which waves are above the rounding of the others in value, slope or second derivative."""
    needed = np.zeros(w.shape, dtype=bool)
    for order in range(3):
        sizes = np.abs(a) * w**order
        total = sizes.sum(axis=0) + (np.abs(constant) if order == 0 else 0.0)
        needed |= sizes * len(w) > total * (torch.finfo(dtype).eps / 8)
    return needed


FOURIER = Fourier(
    name="fourier",
    title="Fourier",
    parameters=(
        Parameter("constant", scalar=True),
        Parameter("coefficients"),
        Parameter("frequencies", tieable=True),
        Parameter("phases"),
    ),
    degrees=range(1, 65),
    default_degree=5,
)
