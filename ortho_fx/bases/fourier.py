"""Fourier expansions, y(x) = a_0 + sum_{k=1..n} a_k cos(w_k x - p_k) / k!, whose frequencies and phases learn too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_fx.bases.basis import Basis, Parameter, Reduce


class Fourier(Basis):
    def evaluate(self, x: Tensor, *parameters: Tensor) -> Tensor:
        constant, coefficients, frequencies, phases = parameters
        y = constant[0]
        for k in range(coefficients.shape[0]):
            weight = coefficients[k] * (1.0 / math.factorial(k + 1))
            y = y + weight * torch.cos(frequencies[k] * x - phases[k])
        return y

    def gradients(self, grad: Tensor, x: Tensor, reduce: Reduce, *parameters: Tensor) -> Sequence[Tensor]:
        _, coefficients, frequencies, phases = parameters
        degree = coefficients.shape[0]
        angles = [frequencies[k] * x - phases[k] for k in range(degree)]
        sines = [torch.sin(angle) for angle in angles]
        # d/dx a cos(w x - p) = -a w sin(w x - p)
        slope = torch.zeros_like(x)
        weights = [coefficients[k] * (1.0 / math.factorial(k + 1)) for k in range(degree)]
        for k in range(degree):
            slope = slope - (weights[k] * frequencies[k]) * sines[k]
        grad_x = grad * slope
        grad_coefficients, grad_frequencies, grad_phases = [], [], []
        for k in range(degree):
            projected = grad * sines[k]
            grad_coefficients.append(reduce(grad * torch.cos(angles[k])) * (1.0 / math.factorial(k + 1)))
            grad_frequencies.append(-weights[k] * reduce(projected * x))
            grad_phases.append(weights[k] * reduce(projected))
        return (
            grad_x,
            reduce(grad).unsqueeze(0),
            torch.stack(grad_coefficients),
            torch.stack(grad_frequencies),
            torch.stack(grad_phases),
        )


FOURIER = Fourier(
    name="fourier",
    title="Fourier",
    parameters=(
        Parameter("constant", scalar=True),
        Parameter("coefficients"),
        Parameter("frequencies"),
        Parameter("phases"),
    ),
    degrees=range(1, 65),
    default_degree=5,
)
