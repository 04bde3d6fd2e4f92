import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ortho_fx import FourierActivation, HermiteActivation, OrthoFxError, freeze_
from ortho_fx.polynomial.conversion import Polynomial, to_polynomial
from ortho_fx.polynomial.monomials import Monomials, ranks, tail_sums


def network(inputs, widths, degrees, outputs=2, **settings):
    layers, size = [], inputs
    for width, degree in zip(widths, degrees, strict=True):
        channels = {"channels": width} if "granularity" in settings else {}
        layers += [nn.Linear(size, width), HermiteActivation(degree, **settings, **channels)]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, outputs)).double()


def perturbed(model, seed=0, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def disagreement(model, x, polynomial=None):
    """The largest difference between network and polynomial, in units of the largest output."""
    with torch.no_grad():
        exact = model.double()(torch.from_numpy(x)).numpy().reshape(len(x), -1)
    polynomial = polynomial or to_polynomial(model, input_shape=x.shape[1:])
    return np.abs(polynomial(x.reshape(len(x), -1)) - exact).max() / np.abs(exact).max()


def points(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@settings(max_examples=30, deadline=None)
@given(
    inputs=st.integers(1, 3),
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=2),
    degrees=st.lists(st.integers(1, 3), min_size=2, max_size=2),
    granularity=st.sampled_from(["layer", "channel"]),
    seed=st.integers(0, 1000),
)
def test_polynomials_are_their_networks(inputs, widths, degrees, granularity, seed):
    torch.manual_seed(seed)
    model = perturbed(network(inputs, widths, degrees[: len(widths)], granularity=granularity), seed)
    polynomial = to_polynomial(model)
    assert disagreement(model, 2 * points(200, inputs, seed=seed), polynomial) < 1e-9
    total = math.prod(degrees[: len(widths)])
    assert polynomial.degree == total
    assert polynomial.terms <= math.comb(inputs + total, total)


def test_coefficients_are_those_of_the_formula():
    model = nn.Sequential(nn.Linear(2, 1), HermiteActivation(degree=3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -1.0]]))
        model[0].bias.fill_(0.5)
        model[1].coefficients.copy_(torch.tensor([0.25, 1.0, 3.0, 6.0]))
    polynomial = to_polynomial(model)
    # The polynomial is 0.25 + h + 3 (h^2 - 1) / 2 + (h^3 - 3 h) with h = 1/2 + 2 a - b.
    a, b = (np.polynomial.Polynomial([0, 1]), 1.5)
    h = 0.5 + 2 * a - b
    expected = 0.25 + h + 1.5 * (h**2 - 1) + h**3 - 3 * h
    for x in (-1.0, 0.3, 2.0):
        assert polynomial([x, b])[0] == pytest.approx(expected(x), rel=1e-14)
    assert polynomial.exponents.tolist() == [
        *([0, 0], [1, 0], [0, 1], [2, 0], [1, 1], [0, 2]),
        *([3, 0], [2, 1], [1, 2], [0, 3]),
    ]
    assert polynomial.coefficients[6:, 0].tolist() == [8, -12, 6, -1]


def test_a_large_network_is_quick():
    torch.manual_seed(0)
    model = network(3, (16, 16), (3, 3))
    to_polynomial(model)
    start = time.perf_counter()
    polynomial = to_polynomial(model)
    assert time.perf_counter() - start < 1
    assert polynomial.degree == 9
    assert polynomial.coefficients.shape == (220, 2)
    assert disagreement(model, points(500, 3), polynomial) < 1e-13


class GatedResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.act = nn.Linear(3, 8), HermiteActivation(2)
        self.project, self.skip = nn.Linear(4, 3), nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, x, shift=1.0):
        gate, value = self.expand(x).chunk(2, dim=-1)
        y = self.project(self.act(gate) * value) * self.scale
        return shift - 0.5 * (x + self.skip(y)) ** 2 / 3


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.act = HermiteActivation(2, granularity="group:2", channels=4, channel_dim=1)
        self.pool, self.last = nn.AvgPool1d(2), nn.Linear(8, 3)

    def forward(self, x):
        y = self.pool(self.act(self.norm(self.first(x)))).transpose(1, 2)
        y = torch.cat([y, y - 1], dim=1).permute(0, 2, 1)[:, :, :2]
        return self.last(y.reshape(x.shape[0], -1)).squeeze(-1)


@pytest.mark.parametrize(
    ("model", "shape", "degree"),
    [
        (GatedResidual(), (3,), 6),
        (Convolutional(), (2, 4), 2),
        (HermiteActivation(4), (2,), 4),
        (nn.Linear(3, 2), (3,), 1),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Identity()), (2, 2), 1),
    ],
    ids=["gated", "convolutional", "activation", "linear", "flattened"],
)
def test_models_of_every_kind(model, shape, degree):
    model = perturbed(model.double().eval())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.running_mean, -1, 1)
    polynomial = to_polynomial(model, input_shape=shape)
    assert polynomial.degree == degree
    assert disagreement(model, points(50, *shape), polynomial) < 1e-12


def test_coefficients_that_are_zero_lower_the_degree_and_the_model_is_left_alone():
    model = network(2, (3,), (5,))
    with torch.no_grad():
        model[1].coefficients[3:] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    polynomial = to_polynomial(model.float())
    assert polynomial.degree == 2
    assert polynomial.coefficients.dtype == np.float64
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert all(torch.equal(value.float(), model.state_dict()[name]) for name, value in before.items())
    with torch.no_grad():
        model[1].coefficients.zero_()
    assert to_polynomial(model).degree == 0


@settings(max_examples=20, deadline=None)
@given(variables=st.integers(1, 5), degree=st.integers(0, 5))
def test_monomials_are_in_graded_order_and_ranked_in_it(variables, degree):
    monomials = Monomials(variables, 10**6)
    exponents = monomials.exponents(degree)
    assert len(exponents) == monomials.count(degree) == len({tuple(row) for row in exponents.tolist()})
    keys = [(sum(row), [-power for power in row]) for row in exponents.tolist()]
    assert keys == sorted(keys)
    assert ranks(tail_sums(exponents)).tolist() == list(range(len(exponents)))


def test_derivatives_are_those_of_the_network():
    torch.manual_seed(1)
    model = perturbed(network(3, (5,), (3,), outputs=1))
    x = torch.from_numpy(points(20, 3)).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    polynomial = to_polynomial(model)
    for i in range(3):
        np.testing.assert_allclose(polynomial.derivative(i)(x.detach())[:, 0], gradient[:, i], rtol=1e-10, atol=1e-12)
    constant = polynomial.derivative(0).derivative(0).derivative(0).derivative(0)
    assert constant([1.0, 2.0, 3.0]).tolist() == [0.0]
    with pytest.raises(OrthoFxError, match="input must be an integer from 0 to 2; got 3"):
        polynomial.derivative(3)


def test_sums_and_shapes():
    torch.manual_seed(2)
    first, second = (to_polynomial(network(2, (3,), (degree,))) for degree in (1, 4))
    x = points(4, 5, 2)
    total = first + second
    assert total(x).shape == (4, 5, 2)
    np.testing.assert_allclose(total(x), first(x) + second(x), rtol=1e-12, atol=1e-12)
    assert total.degree == 4
    assert len(total.exponents) == math.comb(6, 4)
    with pytest.raises(OrthoFxError, match=r"arrays of shape \(\.\.\., 2\); got \(3,\)"):
        total([1.0, 2.0, 3.0])
    with pytest.raises(OrthoFxError, match="with 2 inputs and 2 outputs; got 3 and 2"):
        total + to_polynomial(network(3, (2,), (1,)))


def test_many_points_are_evaluated_in_pieces(monkeypatch):
    polynomial = to_polynomial(network(2, (3,), (3,)))
    x = points(37, 2)
    whole = polynomial(x)
    monkeypatch.setattr("ortho_fx.polynomial.conversion._CHUNK", 50)
    np.testing.assert_allclose(polynomial(x), whole, rtol=1e-13)


def test_strings():
    exponents = np.array([[0, 0], [1, 0], [0, 1], [2, 1]])
    polynomial = Polynomial(exponents, np.array([[0.5, 0], [1.2, -1], [0, 0], [-0.3, 12345.678]]))
    assert str(polynomial) == "y0 = 0.5 + 1.2 x0 - 0.3 x0^2 x1\ny1 = -x0 + 1.235e+04 x0^2 x1"
    assert polynomial.format(digits=7, most_terms=1) == "y0 = 0.5 + 2 more terms\ny1 = -x0 + 1 more term"
    assert str(Polynomial(exponents[:1], np.zeros((1, 1)))) == "y0 = 0"
    assert repr(polynomial) == "Polynomial(inputs=2, outputs=2, degree=3, terms=3)"


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class MixesSamples(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class InPlace(nn.Module):
    def forward(self, x):
        y = x.add_(1)
        return y * x


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class Quotient(nn.Module):
    def forward(self, x):
        return 1 / x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), r"1 \(LayerNorm\): it is neither affine nor a Hermite"),
        (nn.Sequential(nn.Linear(2, 2), nn.GELU()), r"1 \(GELU\): it is neither"),
        (nn.Sequential(nn.Linear(2, 2), FourierActivation()), r"1 \(FourierActivation\): a Fourier expansion is not"),
        (
            nn.Sequential(nn.Linear(2, 2), HermiteActivation(clamp=3.0)),
            r"1 \(HermiteActivation\): its input is clamped",
        ),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), r"1 \(Dropout\): it drops at random: call model.eval\(\)"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), r"1 \(BatchNorm1d\): it divides by the deviation"),
        (nn.Sequential(nn.Linear(2, 2), MixesSamples()), "mean in 1: it mixes the samples of a batch"),
        (nn.Sequential(nn.Linear(2, 2), InPlace()), "add_ in 1: it changes in place what is read elsewhere"),
        (nn.Sequential(nn.Linear(2, 2), Quotient()), "truediv in 1: it divides by what depends on the input"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 2)),
            r"1 \(Linear\): .*mat1 and mat2 shapes cannot be",
        ),
        (Branching(), "Branching cannot be traced by torch.fx: symbolically traced variables cannot be used"),
        (HermiteActivation(), "the number of inputs is not known: pass input_shape="),
        (TwoInputs(), "the model must take one tensor; it takes y as well"),
        (
            network(8, (8, 8), (5, 5)),
            r"8 polynomials of degree 15 in 8 inputs have 490314 terms and 3922512 coefficients",
        ),
        (nn.ReLU, "the model must be a torch.nn.Module; got type"),
    ],
)
def test_what_is_not_polynomial_is_named(model, message):
    with pytest.raises(OrthoFxError, match=message):
        to_polynomial(model)


def test_frozen_models_and_wrong_shapes_are_named():
    model = network(2, (3,), (2,))
    freeze_(model)
    with pytest.raises(OrthoFxError, match="it is frozen: take the polynomial before freeze_"):
        to_polynomial(model)
    with pytest.raises(OrthoFxError, match="input_shape must be a number above zero or a tuple of them; got 0"):
        to_polynomial(HermiteActivation(), input_shape=0)
