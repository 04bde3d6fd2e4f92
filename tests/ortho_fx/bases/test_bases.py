"""The formulas of the bases: values against independent references, gradients against autograd."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.polynomial.chebyshev import chebval
from numpy.polynomial.hermite_e import hermeval

from ortho_fx.bases import (
    BASES,
    CHEBYSHEV,
    FOURIER,
    GELU_SERIES,
    HERMITE,
    PIECEWISE_POWER,
    RELU_SQUARED_SERIES,
    SAFE_RATIONAL,
    SILU_SERIES,
    TROPICAL,
    TROPICAL_RATIONAL,
)
from ortho_fx.bases.basis import Basis


def random_parameters(basis: Basis, degree: int, seed: int = 0, tied: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.size(degree, tied), generator=generator, dtype=torch.float64).requires_grad_(p.learnable)
        for p in basis.parameters
    ]


def gradients(basis: Basis, grad: torch.Tensor, x: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """The gradient of x and of each learnable parameter."""
    prepared = basis.prepare(x.dtype, *parameters)
    grad_x, terms = basis.derivatives(grad, x, *prepared)
    return [grad_x(), *basis.collect_prepared(torch.stack([term().sum() for term in terms]), parameters, prepared)]


@pytest.mark.parametrize("degree", [1, 2, 3, 8, 32])
def test_hermite_is_the_sum_of_probabilists_hermite_polynomials(degree):
    (a,) = random_parameters(HERMITE, degree)
    x = np.linspace(-5, 5, 101)
    expected = hermeval(x, a.detach().numpy() / [float(math.factorial(k)) for k in range(degree + 1)])
    np.testing.assert_allclose(HERMITE.evaluate(torch.from_numpy(x), a.detach()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("degree", [1, 2, 5, 64])
def test_fourier_is_the_sum_of_cosines_over_factorials(degree, tied):
    parameters = [p.detach() for p in random_parameters(FOURIER, degree, tied=tied)]
    constant, a, w, p = (parameter.numpy() for parameter in parameters)
    w = w * np.arange(1, degree + 1) if tied else w
    x = np.linspace(-5, 5, 101)
    expected = constant[0] + sum(
        a[k - 1] * np.cos(w[k - 1] * x - p[k - 1]) / math.factorial(k) for k in range(1, degree + 1)
    )
    actual = FOURIER.evaluate(torch.from_numpy(x), *FOURIER.prepare(torch.float64, *parameters))
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("degree", [1, 5, 64])
def test_tropical_is_a_maximum_of_lines_and_the_rational_a_difference_of_two(degree):
    s, b, t, c = (p.detach() for p in random_parameters(TROPICAL_RATIONAL, degree))
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    up = (x[:, None] * s + b).amax(1)
    down = (x[:, None] * t + c).amax(1)
    torch.testing.assert_close(TROPICAL.evaluate(x, *TROPICAL.prepare(x.dtype, s, b)), up)
    difference = TROPICAL_RATIONAL.evaluate(x, *TROPICAL_RATIONAL.prepare(x.dtype, s, b, t, c))
    torch.testing.assert_close(difference, up - down)


@pytest.mark.parametrize("degree", [1, 2, 5, 16])
def test_chebyshev_is_the_sum_of_chebyshev_polynomials(degree):
    a, centre, scale = (p.detach() for p in random_parameters(CHEBYSHEV, degree))
    x = np.linspace(-5, 5, 101)
    expected = chebval((x - centre.item()) * scale.item(), a.numpy())
    np.testing.assert_allclose(CHEBYSHEV.evaluate(torch.from_numpy(x), a, centre, scale), expected, rtol=1e-9)


@pytest.mark.parametrize("degree", [2, 5, 16])
def test_safe_rational_is_a_quotient_without_a_pole(degree):
    a, b = (p.detach() for p in random_parameters(SAFE_RATIONAL, degree))
    x = torch.linspace(-1e3, 1e3, 4001, dtype=torch.float64)
    y = SAFE_RATIONAL.evaluate(x, a, b)
    expected = np.polyval(a.numpy()[::-1], x) / (1 + np.polyval(b.numpy()[::-1], x) ** 2)
    np.testing.assert_allclose(y, expected, rtol=1e-9)
    largest = a.abs().sum() / b[-1] ** 2
    far = x.abs() > 100
    assert (y[far].abs() <= 4 * largest * (x[far].abs() if degree % 2 else 1)).all()


@pytest.mark.parametrize("degree", [1, 2, 5, 8])
def test_piecewise_powers_are_two_polynomials_that_meet_at_the_knot(degree):
    parameters = [p.detach() for p in random_parameters(PIECEWISE_POWER, degree)]
    constant, knot, right, left = (p.numpy() for p in parameters)
    x = np.linspace(-5, 5, 101)
    side = np.where(x > knot, np.polyval([*right[::-1], 0.0], x - knot), np.polyval([*left[::-1], 0.0], x - knot))
    np.testing.assert_allclose(
        PIECEWISE_POWER.evaluate(torch.from_numpy(x), *parameters), constant + side, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(
    ("basis", "function"),
    [(GELU_SERIES, F.gelu), (SILU_SERIES, F.silu), (RELU_SQUARED_SERIES, lambda x: F.relu(x).square())],
)
def test_a_series_is_its_stock_activation_plus_a_hermite_expansion(basis, function):
    a, weight, scale, shift = (p.detach() for p in random_parameters(basis, 4))
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    expected = weight * function(scale * x + shift) + HERMITE.evaluate(x, a)
    torch.testing.assert_close(basis.evaluate(x, a, weight, scale, shift), expected)


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in BASES), ("fourier", True)])
def test_gradients_are_those_of_autograd(name, tied, degree):
    basis = BASES[name]
    parameters = random_parameters(basis, degree, tied=tied)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    grad = torch.randn(3, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sources = [x, *(p for p in parameters if p.requires_grad)]
    expected = torch.autograd.grad(basis.evaluate(x, *basis.prepare(x.dtype, *parameters)), sources, grad)
    actual = gradients(basis, grad, x.detach(), *(p.detach() for p in parameters))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_hermite_gradient_at_zero_is_the_odd_part():
    a = torch.tensor([0.3, 0.5, 0.2, 0.7], dtype=torch.float64)
    grad_x, _ = gradients(HERMITE, *torch.tensor([[1.0], [0.0]], dtype=torch.float64), a)
    # P_1' = 1, P_2' = x, P_3' = (x^2 - 1) / 2
    assert grad_x.item() == pytest.approx(0.5 - 0.7 / 2)


def test_the_first_of_tied_pieces_takes_the_gradient():
    slopes = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    offsets = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    x = torch.zeros(1, dtype=torch.float64)
    (x[:, None] * slopes + offsets).max(1).values.sum().backward()
    grad_x, grad_offsets = gradients(TROPICAL, torch.ones(1, dtype=torch.float64), x, slopes, offsets.detach())
    assert grad_x.item() == 1.0
    torch.testing.assert_close(grad_offsets, offsets.grad)
