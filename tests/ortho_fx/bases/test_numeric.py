"""The numeric defaults of bases, with the closed forms of ours as the oracle."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ortho_fx import ExpansionConfig, fit, register_basis
from ortho_fx.bases import BASES, HERMITE, numeric
from ortho_fx.numerics.initialisation import initial_parameters
from tests.kinds import KINDS, bases_from_outside, basis_of, config_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("bounds", [None, (-1.2, 0.7), (-0.3, 40.0)])
@pytest.mark.parametrize("degree", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_in_closed_form(kind, degree, bounds):
    basis, values = basis_of(kind), initial_parameters(config_of(kind, degree))
    numbers = astuple(numeric.moments(basis, values, bounds))
    assert numbers == pytest.approx(astuple(basis.moments(values, bounds)), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_groups_are_columns(kind):
    basis = basis_of(kind)
    groups = [initial_parameters(config_of(kind, 4, clamp=clamp)) for clamp in (None, 1.0)]
    columns = {name: np.stack([values[name] for values in groups], axis=1) for name in groups[0]}
    x = np.linspace(-2, 2, 9)
    together = numeric.sampled(basis, columns, x, (-1.0, 1.5))
    for column, values in enumerate(groups):
        alone = numeric.sampled(basis, values, x, (-1.0, 1.5))
        for both, one in zip(together, alone, strict=True):
            np.testing.assert_allclose(both[:, column], one, atol=1e-14)


@pytest.mark.parametrize("degree", [1, 3, 8])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 2.0), (-3.0, 0.5)])
def test_rescaling_polynomials_is_exact(degree, mean, std):
    values = initial_parameters(config_of("hermite", degree))
    moved = numeric.rescaled(HERMITE, values, mean, std)
    x = mean + std * np.linspace(-3, 3, 50)
    exact = numeric.sampled(HERMITE, HERMITE.rescale(values, mean, std), x)
    for actual, expected in zip(numeric.sampled(HERMITE, moved, x), exact, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_keeps_the_gains(kind):
    basis, values = basis_of(kind), initial_parameters(config_of(kind, 3))
    moved = numeric.rescaled(basis, values, 0.2, 1.3)
    unit = basis.moments(basis.rescale(moved, -0.2 / 1.3, 1 / 1.3))
    assert (unit.square, unit.derivative_square) == pytest.approx((1, 1), abs=1e-8)


@pytest.mark.parametrize(("degree", "bounds"), [(1, None), (1, (-1.0, 1.0)), (2, None)])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_have_gains_of_one(kind, degree, bounds):
    basis = basis_of(kind)
    unit = basis.moments(numeric.start(basis, degree, bounds, kind.endswith("tied")), bounds)
    assert (unit.square, unit.derivative_square) == pytest.approx((1, 1), abs=1e-8)
    assert abs(unit.square_growth) < 2 or degree == 1


@pytest.mark.parametrize("derivative_weight", [0.0, 1.0])
@pytest.mark.parametrize("degree", [2, 8, 20])
def test_linear_fits_are_those_of_the_basis(degree, derivative_weight):
    class Plain(type(HERMITE)):
        fit = numeric.fitted

    with bases_from_outside():
        name = f"plain{degree}{derivative_weight:g}".replace(".", "")
        register_basis(Plain(name, name.title(), HERMITE.parameters, HERMITE.degrees, 3))
        its, ours = (
            fit(F.silu, ExpansionConfig(basis, degree), derivative_weight=derivative_weight)
            for basis in (name, "hermite")
        )
    assert its.rmse == pytest.approx(ours.rmse, rel=1e-3)
    assert name not in BASES


@pytest.mark.parametrize("name", ["fourier", "tropical_rational"])
def test_fits_that_are_not_linear_come_close(name):
    basis = BASES[name]
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = torch.from_numpy(nodes).requires_grad_()
    y = F.gelu(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    problem = numeric.Problem(
        nodes, weights / math.sqrt(2 * math.pi), y.detach().numpy(), slope.numpy(), np.ones(60), 0.0, True
    )
    values = numeric.fitted(basis, problem, 3)
    error = numeric.sampled(basis, values, nodes)[0] - problem.value
    assert math.sqrt(problem.weight @ error**2) < 0.05
    again = numeric.fitted(basis, problem, 3)
    assert all(np.array_equal(values[key], again[key]) for key in values)
