"""The start for a plain network of L layers: its gains, its map of cosines, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from ortho_fx import ExpansionConfig, OrthoFxError
from ortho_fx.activations.expansion import make_activation
from ortho_fx.bases import HERMITE, Basis
from ortho_fx.bases.basis import Parameter
from ortho_fx.bases.deep import COSINE, network_cosine, orthonormal_coefficients
from ortho_fx.bases.numeric import sampled
from ortho_fx.numerics.initialisation import initial_parameters
from tests.kinds import KINDS, basis_of, config_of


def gains_of(basis, values, bounds=None):
    unit = basis.moments(values, bounds)
    return unit.square, unit.derivative_square


@pytest.mark.parametrize("depth", [50, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_gains_are_one_and_orthogonal_inputs_keep_their_angle(kind, depth):
    basis, values = basis_of(kind), initial_parameters(config_of(kind, init=f"depth:{depth}"))
    assert gains_of(basis, values) == pytest.approx((1, 1), abs=1e-9)
    coefficients = orthonormal_coefficients(basis, values)
    assert network_cosine(coefficients, depth) == pytest.approx(COSINE, abs=1e-5)
    # The stable start loses the angle at this depth.
    stable = orthonormal_coefficients(basis, initial_parameters(config_of(kind)))
    assert network_cosine(stable, depth) > 0.7


def test_the_map_is_that_of_gaussian_inputs():
    values = HERMITE.start(3)
    coefficients = orthonormal_coefficients(HERMITE, values)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    x, y = np.meshgrid(nodes, nodes)
    weight = np.outer(weights, weights) / (2 * math.pi)
    for cosine in (-0.5, 0.0, 0.9):
        other = cosine * x + math.sqrt(1 - cosine**2) * y
        products = sampled(HERMITE, values, x.ravel())[0] * sampled(HERMITE, values, other.ravel())[0]
        assert network_cosine(coefficients, 1, cosine) == pytest.approx(weight.ravel() @ products, abs=1e-9)


@pytest.mark.parametrize("kind", ["hermite", "tropical", "safe_rational"])
def test_a_wide_network_keeps_the_angle(kind):
    depth, width = 30, 256
    activation = make_activation(config_of(kind, init=f"depth:{depth}"), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(width, 8, generator=generator, dtype=torch.float64))[0].T * math.sqrt(width)
    for _ in range(depth):
        x = activation(x @ torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0])
    unit = torch.nn.functional.normalize(x)
    cosines = (unit @ unit.T)[~torch.eye(8, dtype=torch.bool)]
    assert cosines.mean().item() == pytest.approx(COSINE, abs=0.1)
    assert x.square().mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_straightened_functions_are_exact(kind):
    basis, values = basis_of(kind), initial_parameters(config_of(kind))
    x = np.linspace(-3, 3, 31)
    straight = sampled(basis, basis.straightened(values, 0.25, 0.8), x)[0]
    mixed = 0.25 * sampled(basis, values, x)[0] + 0.75 * 0.8 * x
    expected = sampled(basis, values, 0.25 * x)[0] / 0.25 if basis.name == "fourier" else mixed
    np.testing.assert_allclose(straight, expected, atol=1e-12)


def test_rationals_of_even_degree_are_straightened_without_a_line():
    basis = basis_of("safe_rational")
    values, x = basis.start(4), np.linspace(-3, 3, 31)
    straight = sampled(basis, basis.straightened(values, 0.25, 0.8), x)[0]
    np.testing.assert_allclose(straight, sampled(basis, values, 0.25 * x)[0] / 0.25, atol=1e-12)


def test_knots_off_zero_and_centres_off_zero_are_straightened_exactly():
    x = np.linspace(-3, 3, 31)
    for name in ("chebyshev", "piecewise_power"):
        basis = basis_of(name)
        values = basis.rescale(basis.start(3), 0.7, 1.5)
        straight = sampled(basis, basis.straightened(values, 0.25, 0.8), x)[0]
        np.testing.assert_allclose(straight, 0.25 * sampled(basis, values, x)[0] + 0.6 * x, atol=1e-12)


def test_a_shallow_network_needs_the_stable_start_only():
    values = initial_parameters(ExpansionConfig("tropical", init="depth:1"))
    np.testing.assert_array_equal(values["offsets"], initial_parameters(ExpansionConfig("tropical"))["offsets"])


def test_the_clamp_counts():
    basis, config = HERMITE, ExpansionConfig("hermite", 3, init="depth:50", clamp=4.0)
    assert gains_of(basis, initial_parameters(config), (-4.0, 4.0)) == pytest.approx((1, 1), abs=1e-9)
    with pytest.raises(OrthoFxError, match=r"init 'depth:100' finds no hermite expansion of degree 3 clamped at 0\.5"):
        initial_parameters(ExpansionConfig("hermite", 3, init="depth:100", clamp=0.5))


class LineAndGate(Basis):
    """a_0 + a_1 x + a_2 sigmoid(x): a basis from outside that has only its formula."""

    def evaluate(self, x, *parameters):
        (a,) = parameters
        return a[0] + a[1] * x + a[2] * x.sigmoid()

    def derivatives(self, grad, x, *parameters):
        (a,) = parameters
        gate = x.sigmoid()
        return lambda: grad * (a[1] + a[2] * gate * (1.0 - gate)), [
            lambda: grad,
            lambda: grad * x,
            lambda: grad * gate,
        ]


class Gate(Basis):
    """a_0 + a_1 sigmoid(a_2 x + a_3): it holds no lines."""

    def evaluate(self, x, *parameters):
        (a,) = parameters
        return a[0] + a[1] * (a[2] * x + a[3]).sigmoid()

    def derivatives(self, grad, x, *parameters):
        raise NotImplementedError


@pytest.mark.parametrize("basis", [LineAndGate, pytest.param(Gate, marks=pytest.mark.slow)])
def test_a_basis_from_outside_needs_its_formula_only(basis):
    size = 3 if basis is LineAndGate else 4
    outside = basis("gate", "Gate", (Parameter("a", offset=size - 1),), range(1, 2), 1)
    values = outside.deep_start(1, 40)
    assert gains_of(outside, values) == pytest.approx((1, 1), abs=1e-8)
    assert network_cosine(orthonormal_coefficients(outside, values), 40) == pytest.approx(COSINE, abs=1e-4)
