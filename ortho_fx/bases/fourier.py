"""Fourier expansions, y(x) = a_0 + sum_{k=1..n} a_k cos(w_k x - p_k) / k!, whose frequencies and phases learn too.

Tied frequencies, w_k = k w, are stored as the one number w. All waves then follow from cos(w x) and sin(w x) by angle
addition: a_k cos(k w x - p_k) / k! is A_k cos(k w x) + B_k sin(k w x) with A_k = a_k cos(p_k) / k! and
B_k = a_k sin(p_k) / k!, which are computed once for all x.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_fx.bases.basis import Basis, Parameter, Term, Value, multiply_add


def _inverse_factorial(k: int) -> float:
    return 1.0 / math.factorial(k)


def _inverse_factorials(like: Tensor) -> Tensor:
    """1 / k! for k = 1, 2, ..., along the first dimension of a tensor, and computed where it is."""
    orders = torch.arange(1, like.shape[0] + 1, dtype=torch.float64, device=like.device)
    return torch.exp(-torch.lgamma(orders + 1)).to(like.dtype).reshape(-1, *(1 for _ in like.shape[1:]))


class Fourier(Basis):
    def prepare(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        """For tied frequencies the constant, A, B and w."""
        constant, coefficients, frequencies, phases = parameters
        if len(frequencies) == len(coefficients):
            return parameters
        coefficients, phases = coefficients.to(dtype), phases.to(dtype)
        weights = coefficients * _inverse_factorials(coefficients)
        # As one tensor: what ends in a concatenation is kept for the backward pass by AOTAutograd, not computed again.
        cosines, sines = torch.stack([weights * phases.cos(), weights * phases.sin()]).unbind()
        return constant, cosines, sines, frequencies

    def evaluate(self, x: Value, *parameters: Value) -> Value:
        if len(parameters[3]) < len(parameters[1]):
            return harmonics(x, *parameters)
        constant, coefficients, frequencies, phases = parameters
        y = constant[0]
        for k in range(len(coefficients)):
            weight = coefficients[k] * _inverse_factorial(k + 1)
            y = multiply_add(weight, (frequencies[k] * x - phases[k]).cos(), y)
        return y

    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        if len(parameters[3]) < len(parameters[1]):
            return _harmonic_derivatives(grad, x, *parameters)
        _, coefficients, frequencies, phases = parameters
        degree = len(coefficients)

        @functools.cache
        def angle(k: int) -> Value:
            return frequencies[k] * x - phases[k]

        @functools.cache
        def sine(k: int) -> Value:
            return angle(k).sin()

        def grad_x() -> Value:
            # d/dx a cos(w x - p) = -a w sin(w x - p)
            slope = 0.0
            for k in range(degree):
                rate = (coefficients[k] * -_inverse_factorial(k + 1)) * frequencies[k]
                slope = multiply_add(rate, sine(k), slope)
            return grad * slope

        return grad_x, [
            lambda: grad,
            *(lambda k=k: grad * angle(k).cos() for k in range(degree)),
            *(lambda k=k: grad * sine(k) for k in range(degree)),
            *(lambda k=k: grad * sine(k) * x for k in range(degree)),
        ]

    def collect(self, sums: Tensor, parameters: Sequence[Tensor], prepared: Sequence[Tensor]) -> Sequence[Tensor]:
        _, coefficients, frequencies, phases = parameters
        degree = coefficients.shape[0]
        factors = _inverse_factorials(coefficients)
        if len(frequencies) < degree:
            constant, cosines, sines, frequency = sums.split([1, degree, degree, 1])
            c, s = factors * phases.cos(), factors * phases.sin()
            return constant, c * cosines + s * sines, frequency, coefficients * (c * sines - s * cosines)
        constant, others = sums.split([1, 3 * degree])
        # One product for all of them, with factors that are computed where the sums are: 1 / k!, and the coefficients
        # for frequencies and phases, those with a minus for frequencies.
        others = others.unflatten(0, (3, degree))
        row = torch.arange(3, device=sums.device).reshape(3, *(1 for _ in sums.shape))
        factors = torch.where(row == 0, factors, torch.where(row == 1, factors * coefficients, -factors * coefficients))
        coefficients, phases, frequencies = (others * factors).unbind()
        return constant, coefficients, frequencies, phases


def harmonics(x: Value, constant: Value, cosines: Value, sines: Value, frequency: Value) -> Value:
    """a_0 + sum of A_k cos(k w x) + B_k sin(k w x)."""
    # Horner's rule for the real part of the sum of (A_k - i B_k) z^k, with z = exp(i w x).
    angle = frequency[0] * x
    c, s = angle.cos(), angle.sin()
    minus_s = s * -1.0
    degree = len(cosines)
    u, v = cosines[degree - 1], sines[degree - 1]
    for k in range(degree - 2, -1, -1):
        u, v = (
            multiply_add(u, c, multiply_add(v, s, cosines[k])),
            multiply_add(v, c, multiply_add(u, minus_s, sines[k])),
        )
    return multiply_add(u, c, multiply_add(v, s, constant[0]))


def _harmonic_derivatives(
    grad: Value, x: Value, constant: Value, cosines: Value, sines: Value, frequency: Value
) -> tuple[Term, list[Term]]:
    degree = len(cosines)

    @functools.cache
    def waves() -> list[tuple[Value, Value]]:
        """grad cos(k w x) and grad sin(k w x)."""
        angle = frequency[0] * x
        c, s = angle.cos(), angle.sin()
        pairs = [(grad * c, grad * s)]
        for _ in range(degree - 1):
            p, q = pairs[-1]
            pairs.append((p * c - q * s, p * s + q * c))
        return pairs

    @functools.cache
    def slope() -> Value:
        """grad times the derivative by the angle w x: sum of k (B_k cos(k w x) - A_k sin(k w x))."""
        pairs = waves()
        # Each wave is added k times: once to every partial sum from the k-th on.
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
