"""Initial gains; dense quadrature of the functions is the oracle."""

import math

import pytest
import torch

from ortho_fx import ExpansionConfig
from ortho_fx.bases import BASES
from ortho_fx.numerics.initialisation import initial_parameters
from tests.kinds import KINDS, basis_of, config_of

pytestmark = pytest.mark.slow

EVERY = [(name, degree) for name in KINDS for degree in basis_of(name).degrees]
SOME = [(name, degree) for name in KINDS for degree in (1, 2, 3, 5, 8, 12, 32) if degree in basis_of(name).degrees]


def function_of(name, values):
    basis = basis_of(name)
    parameters = basis.prepare(torch.float64, *(torch.from_numpy(values[p.name]) for p in basis.parameters))
    return lambda x: basis.evaluate(x, *parameters)


def quadrature(function, points):
    """E[f], E[f^2], E[f'^2], E[(X^2 - 1) f], E[(X^2 - 1) f^2] by the midpoint rule."""
    x = (torch.arange(points, dtype=torch.float64) + 0.5) * (24 / points) - 12
    weight = torch.exp(-x * x / 2)
    weight /= weight.sum()
    x.requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    y, x = y.detach(), x.detach()
    growth = x * x - 1
    return [float((weight * v).sum()) for v in (y, y * y, slope * slope, growth * y, growth * y * y)]


@pytest.mark.parametrize(
    ("name", "degree", "init"),
    [(name, n, init) for name, n in SOME for init in ("stable", "paper")[: 1 + basis_of(name).has_paper_start]],
)
def test_closed_forms_agree_with_quadrature(name, degree, init):
    values = initial_parameters(config_of(name, degree, init))
    g = basis_of(name).moments(values)
    closed = [g.mean, g.square, g.derivative_square, g.mean_growth, g.square_growth]
    # At two million points a kink costs an error of about 1e-6.
    points = 2_000_000 if basis_of(name).piecewise else 100_000
    assert closed == pytest.approx(quadrature(function_of(name, values), points), abs=2e-5)


@pytest.mark.parametrize(("name", "degree"), EVERY)
def test_stable_gains_are_one_and_attract(name, degree):
    g = basis_of(name).moments(initial_parameters(config_of(name, degree)))
    assert abs(g.square - 1) < 1e-12
    assert abs(g.derivative_square - 1) < 1e-12
    if degree == 1 and basis_of(name).is_polynomial:  # the identity
        assert g.square_growth / 2 == pytest.approx(1)
    else:
        # Tropical is the closest to a line, for which the value is 1.
        assert abs(g.square_growth / 2) < (0.95 if name == "tropical" else 0.9)


@pytest.mark.parametrize("degree", [1, 3, 8, 32])
def test_paper_hermite_gains_are_one_with_the_finite_sum(degree):
    g = BASES["hermite"].moments(initial_parameters(ExpansionConfig("hermite", degree, "paper")))
    assert (g.square, g.derivative_square) == pytest.approx((1, 1), abs=1e-12)


def test_paper_initialisation_has_the_published_gains():
    fourier = BASES["fourier"].moments(initial_parameters(ExpansionConfig("fourier", 64, "paper")))
    tropical = BASES["tropical"].moments(initial_parameters(ExpansionConfig("tropical", 5, "paper")))
    assert (fourier.square, fourier.derivative_square) == pytest.approx((1.307, 0.965), abs=1e-3)
    assert (tropical.square, tropical.derivative_square) == pytest.approx((1.399, 1.000), abs=1e-3)


@pytest.mark.parametrize("init", ["stable", "paper"])
@pytest.mark.parametrize("degree", [1, 5, 64])
def test_tied_frequencies_start_as_the_same_function(degree, init):
    tied, free = (initial_parameters(config_of(kind, degree, init)) for kind in ("fourier tied", "fourier"))
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(function_of("fourier tied", tied)(x), function_of("fourier", free)(x))
    assert len(tied["frequencies"]) == 1


@pytest.mark.parametrize("degree", [1, 5, 12, 64])
@pytest.mark.parametrize("name", ["tropical", "tropical_rational"])
def test_every_tropical_piece_is_the_maximum_somewhere_likely(name, degree):
    values = initial_parameters(ExpansionConfig(name, degree))
    x = torch.linspace(-3.5, 3.5, 20001, dtype=torch.float64)
    for slopes, offsets in (("slopes", "offsets"), ("denominator_slopes", "denominator_offsets")):
        if slopes in values:
            lines = x[:, None] * torch.from_numpy(values[slopes]) + torch.from_numpy(values[offsets])
            assert lines.argmax(1).unique().numel() == degree + 1


@pytest.mark.parametrize(
    ("name", "degree"), [("hermite", 3), ("fourier", 5), ("tropical", 5), ("tropical_rational", 6)]
)
def test_a_deep_plain_network_keeps_its_signal_and_its_gradient(name, degree):
    function = function_of(name, initial_parameters(ExpansionConfig(name, degree)))
    generator = torch.Generator().manual_seed(0)
    width = 512
    h = first = torch.randn(64, width, generator=generator, dtype=torch.float64).requires_grad_()
    for _ in range(30):
        weight = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
        h = function(h @ weight)
        assert 0.5 < h.square().mean() < 2
    seed = torch.randn(h.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad((h * seed).sum(), first)
    assert 0.2 < grad.square().mean().sqrt() < 5


def test_the_papers_hermite_initialisation_does_not():
    function = function_of("hermite", initial_parameters(ExpansionConfig("hermite", 3, "paper")))
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(64, 512, generator=generator, dtype=torch.float64)
    for _ in range(16):
        h = function(h @ torch.randn(512, 512, generator=generator, dtype=torch.float64) / math.sqrt(512))
    assert not h.isfinite().all() or h.square().mean() > 1e6
