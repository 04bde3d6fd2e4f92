"""Fits; dense quadrature of the fitted modules is the oracle for every error that they state."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ortho_fx import ExpansionConfig, OrthoFxError, fit, rewrite_
from ortho_fx.activations.expansion import make_activation
from ortho_fx.bases import BASES
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.passes.vocabulary.targets import relu_squared

pytestmark = pytest.mark.slow

CONFIGS = [
    ExpansionConfig("hermite", 3),
    ExpansionConfig("hermite", 8),
    ExpansionConfig("fourier", 6),
    ExpansionConfig("fourier", 6, tied=True),
    ExpansionConfig("tropical", 5),
    ExpansionConfig("tropical_rational", 6),
    ExpansionConfig("chebyshev", 8),
    ExpansionConfig("safe_rational", 5),
    ExpansionConfig("piecewise_power", 3),
    ExpansionConfig("silu_series", 3),
]
LARGEST = [ExpansionConfig("fourier", 64), ExpansionConfig("fourier", 64, tied=True), ExpansionConfig("hermite", 32)]
FUNCTIONS = [F.gelu, F.relu, F.silu, torch.tanh]


def grid(low, high, count=1_000_000):
    return low + (torch.arange(count, dtype=torch.float64) + 0.5) * ((high - low) / count)


def rms(weight, error):
    return math.sqrt(float((weight * error**2).sum() / weight.sum()))


@pytest.mark.parametrize("weight", ["gaussian", "uniform"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_stated_errors_are_those_of_the_module(config, function, weight):
    if weight == "gaussian":
        result, x = fit(function, config), grid(-12, 12)
        density = torch.exp(-x * x / 2)
    else:
        result, x = fit(function, config, weight="uniform", interval=(-4, 5)), grid(-4, 5)
        density = torch.ones_like(x)
    activation = result.activation(dtype=torch.float64)
    x.requires_grad_()
    errors = []
    for y in (activation(x), function(x)):
        (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        errors.append((y.detach(), slope))
    value, slope = (a - b for a, b in zip(*errors, strict=True))
    assert result.rmse == pytest.approx(rms(density, value), rel=0.01, abs=1e-12)
    assert result.derivative_rmse == pytest.approx(rms(density, slope), rel=0.05, abs=1e-12)
    shown = (x >= result.interval[0]) & (x <= result.interval[1])
    assert result.max_error == pytest.approx(value[shown].abs().max().item(), rel=0.06, abs=1e-12)


@pytest.mark.parametrize("degree", [3, 8, 32])
def test_gaussian_hermite_fit_is_the_projection(degree):
    x = grid(-14, 14)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (28 / len(x))
    coefficients = fit(F.gelu, ExpansionConfig("hermite", degree)).parameters["coefficients"]
    he = [torch.ones_like(x), x]
    for k in range(2, degree + 1):
        he.append(x * he[-1] - (k - 1) * he[-2])
    for k in range(degree + 1):
        exact = float((density * F.gelu(x) * he[k]).sum())
        assert coefficients[k] == pytest.approx(exact, rel=1e-6, abs=1e-6 * math.sqrt(math.factorial(k)))


@settings(max_examples=30, deadline=None)
@given(
    config=st.sampled_from(CONFIGS),
    function=st.sampled_from(FUNCTIONS),
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1e-3, 1e-2, 1e-1]),
    weight=st.sampled_from(["gaussian", "uniform"]),
    derivative_weight=st.sampled_from([0.0, 1.0]),
)
def test_no_change_of_the_parameters_comes_closer(config, function, seed, size, weight, derivative_weight):
    options = {"interval": (-4.0, 4.0), "derivative_weight": derivative_weight}
    result = fit(function, config, weight=weight, **options)
    x = grid(-4, 4, 20_000).requires_grad_()
    density = torch.exp(-(x.detach() ** 2) / 2) if weight == "gaussian" else torch.ones(20_000, dtype=torch.float64)
    exact = function(x)
    (exact_slope,) = torch.autograd.grad(exact.sum(), x)
    basis = BASES[config.basis]

    def cost(parameters):
        values = (torch.from_numpy(parameters[p.name]) for p in basis.parameters)
        y = basis.evaluate(x, *basis.prepare(x.dtype, *values))
        (slope,) = torch.autograd.grad(y.sum(), x)
        error = (y - exact).detach() ** 2 + derivative_weight * (slope - exact_slope) ** 2
        return float((density * error).sum() / density.sum())

    generator = np.random.default_rng(seed)
    linear = next(
        name for name in ("offsets", "numerator", "right", "constant", "coefficients") if name in result.parameters
    )
    moved = dict(result.parameters)
    values = moved[linear]
    scale = (
        np.sqrt([math.factorial(k) for k in range(len(values))]) if config.basis in ("hermite", "silu_series") else 1.0
    )
    moved[linear] = values + size * scale * generator.normal(size=len(values))
    # The quadrature of the fit and of this test differ by about 1e-6.
    assert cost(result.parameters) <= cost(moved) * 1.02 + 1e-6


@pytest.mark.parametrize("degree", [1, 3, 6])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_other_fundamental_comes_closer(function, degree):
    x = grid(-8, 8, 4000)
    root = torch.exp(-x * x / 4)
    target = (root * function(x)).numpy()

    def error(fundamental):
        angles = np.outer(x.numpy(), fundamental * np.arange(1, degree + 1))
        columns = root.numpy()[:, None] * np.concatenate([np.ones((len(x), 1)), np.cos(angles), np.sin(angles)], axis=1)
        residual = columns @ np.linalg.lstsq(columns, target, rcond=None)[0] - target
        return math.sqrt(float(residual @ residual / (root @ root)))

    result = fit(function, ExpansionConfig("fourier", degree, tied=True))
    assert result.rmse <= 1.02 * min(error(fundamental) for fundamental in np.linspace(0.05, 3, 200))


def test_tied_frequencies_cost_closeness_at_low_degrees_and_little_at_high_ones():
    for function in FUNCTIONS:
        ratios = []
        for degree in (6, 24):
            free, tied = (fit(function, ExpansionConfig("fourier", degree, tied=tied)) for tied in (False, True))
            # Below 1e-7 the rounding of float32 decides.
            ratios.append((tied.rmse + 1e-7) / (free.rmse + 1e-7))
        assert 1 < ratios[0] < 70
        assert ratios[1] < 2


@pytest.mark.parametrize("function", [F.relu, F.leaky_relu, lambda x: F.relu6(x), F.hardtanh, lambda x: 2 * x - 1])
def test_piecewise_linear_functions_are_met_exactly(function):
    result = fit(function, ExpansionConfig("tropical_rational", 6))
    assert result.rmse < 1e-9
    assert result.derivative_rmse < 1e-9


EXACT = [
    ("gelu_series", F.gelu),
    ("silu_series", F.silu),
    ("relu_squared_series", relu_squared),
    ("piecewise_power", relu_squared),
    ("piecewise_power", lambda x: F.leaky_relu(x, 0.5).square()),
    ("piecewise_power", lambda x: x.square() * torch.where(x > 0, 1.0, -0.3)),
    ("tropical", F.relu),
]


@pytest.mark.parametrize(("basis", "function"), EXACT)
def test_an_exact_start_is_the_activation_itself(basis, function):
    activation = make_activation(ExpansionConfig(basis, init="exact"), reference=function)
    x = torch.linspace(-9, 9, 100_001).requires_grad_()
    y, expected = activation(x), function(x)
    torch.testing.assert_close(y.double(), function(x.detach().double()), rtol=6e-7, atol=6e-7)
    torch.testing.assert_close(y, expected, rtol=6e-7, atol=2e-6)  # PyTorch's own GELU is off by 1e-6 in float32
    slopes = (torch.autograd.grad(each.sum(), x)[0] for each in (y, expected))
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("basis", "function"), [("hermite", F.gelu), ("gelu_series", F.silu), ("tropical", F.silu)])
def test_an_exact_start_that_does_not_exist_is_refused(basis, function):
    config = ExpansionConfig(basis, init="exact")
    with pytest.raises(OrthoFxError, match=rf"^init 'exact': no {config} expansion is .*; the closest is off by "):
        make_activation(config, reference=function)
    model = nn.Sequential(nn.Linear(2, 2), nn.Mish())
    with pytest.raises(OrthoFxError, match=r"^1: init 'exact': no .* expansion is mish"):
        rewrite_(model, config)
    assert isinstance(model[1], nn.Mish)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_fits_are_deterministic_and_no_fit_answers_for_another(config):
    first = fit(F.relu, config)
    fit(F.gelu, config)
    again = fit(F.relu, config)
    for name, values in first.parameters.items():
        np.testing.assert_array_equal(values, again.parameters[name])


def test_degree_brings_the_fit_closer():
    for name in ("hermite", "fourier", "tropical_rational"):
        errors = [fit(F.silu, ExpansionConfig(name, degree)).rmse for degree in (2, 4, 8)]
        assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("config", [*CONFIGS, *LARGEST], ids=str)
def test_float32_holds_the_fit(config):
    result = fit(F.gelu, config)
    x = torch.linspace(-4, 4, 1001)
    error = (result.activation()(x).double() - result(x)).abs().max()
    assert error < 2e-5


def test_measured_weight_is_that_of_the_samples():
    generator = torch.Generator().manual_seed(0)
    samples = 1.5 + 0.2 * torch.randn(200_000, generator=generator)
    config = ExpansionConfig("hermite", 4)
    measured = fit(F.gelu, config, weight="measured", samples=samples)
    gaussian = fit(F.gelu, config, mean=1.5, std=0.2)
    assert measured.rmse == pytest.approx(gaussian.rmse, rel=0.05)
    assert measured.rmse < 1e-4 < fit(F.gelu, config).rmse
    assert rms(torch.ones(len(samples)), measured(samples) - F.gelu(samples.double())) == pytest.approx(
        measured.rmse, rel=0.05
    )
    histogram = Histogram()
    for chunk in samples.split(50_000):
        histogram.add(chunk)
    merged = fit(F.gelu, config, weight="measured", samples=histogram)
    assert merged.rmse == pytest.approx(measured.rmse, rel=0.05)


@pytest.mark.parametrize("config", [replace(config, clamp=2.0) for config in CONFIGS], ids=str)
def test_clamped_fits_know_of_the_clamp(config):
    result = fit(torch.tanh, config)
    x = torch.tensor([-9.0, -2.0, 2.0, 9.0], dtype=torch.float64)
    y = result(x)
    assert y[0] == y[1]
    assert y[2] == y[3]
    assert torch.equal(result.activation(dtype=torch.float64)(x), y)
    assert result.rmse < fit(torch.tanh, replace(config, clamp=None)).rmse * 1.5 + 0.02


def test_derivative_weight_trades_value_for_slope():
    config = ExpansionConfig("hermite", 5)
    options = {"weight": "uniform", "interval": (-3, 3)}
    value, both = (fit(F.gelu, config, derivative_weight=w, **options) for w in (0.0, 10.0))
    assert both.derivative_rmse < value.derivative_rmse
    assert both.rmse > value.rmse


def test_a_fit_prints_its_errors_and_parameters_and_draws_itself(tmp_path):
    result = fit(F.gelu, ExpansionConfig("hermite", 3))
    lines = str(result).splitlines()
    assert lines[0] == "hermite 3 fit of gelu, gaussian weight, errors on [-5, 5]"
    assert lines[1].split()[:2] == ["value", "rmse"]
    assert lines[3].startswith("coefficients  0.28209479 0.5 0.42314219")
    result.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 10_000
    with pytest.raises(OrthoFxError, match=r"^cannot write "):
        result.plot(tmp_path / "missing" / "fit.png")


HERMITE = ExpansionConfig("hermite", 3)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (torch.sqrt, {}, "sqrt returns NaN at x = -"),
        (torch.sum, {}, r"sum must return a tensor of its input's shape \("),
        (torch.log, {"interval": (-1.0, 1.0)}, "log returns NaN at x = -"),
        (lambda x: 1 / torch.relu(x), {}, "<lambda> or its derivative is not finite at x = -"),
        (F.gelu, {"interval": (3.0, -3.0)}, r"interval must be two finite numbers, the lower one first; got \(3.0, -3"),
        (F.gelu, {"interval": (1.0, 1.0)}, "interval must be two finite numbers"),
        (F.gelu, {"interval": (0.0, math.inf)}, "interval must be two finite numbers"),
        (F.gelu, {"weight": "flat"}, "weight must be one of gaussian, uniform, measured; got 'flat'"),
        (F.gelu, {"weight": "uniform"}, "weight 'uniform' needs an interval"),
        (F.gelu, {"weight": "measured"}, "weight 'measured' needs samples, and samples need weight 'measured'"),
        (F.gelu, {"weight": "measured", "samples": torch.empty(0)}, "samples are empty"),
        (F.gelu, {"weight": "measured", "samples": torch.ones(9)}, r"samples are constant \(1\)"),
        (F.gelu, {"weight": "measured", "samples": torch.tensor([1.0, math.nan])}, "samples are not finite"),
        (
            F.gelu,
            {"weight": "measured", "samples": torch.tensor([1.0, 2.0, 3.0])},
            "a hermite 3 fit has 4 coefficients for 3 nodes: fit fewer",
        ),
        (F.gelu, {"derivative_weight": -1.0}, "derivative_weight must be zero or more; got -1.0"),
        (F.gelu, {"std": 0.0}, "mean must be finite and std finite and above zero; got 0.0 and 0.0"),
    ],
)
def test_mistakes_are_named(function, options, message):
    with pytest.raises(OrthoFxError, match=f"^{message}"):
        fit(function, HERMITE, **options)


@pytest.mark.parametrize(
    "settings",
    [
        {"mean": 1.0, "std": 1e-300},
        {"mean": 1e300},
        {"mean": 1e308, "std": 1e308},
        {"std": 1e-320},
        {"weight": "uniform", "interval": (0.0, 5e-324)},
        {"weight": "uniform", "interval": (1.0, 1.0 + 1e-15)},
        {"weight": "uniform", "interval": (-1e308, 1e308)},
    ],
)
@pytest.mark.parametrize("basis", BASES)
def test_places_that_floats_cannot_tell_apart_or_hold_are_refused(basis, settings):
    with pytest.raises(OrthoFxError, match="for floats to tell inputs apart; got a width of"):
        fit(F.gelu, ExpansionConfig(basis), **settings)


@pytest.mark.parametrize("std", [1e-29, 1e-12, 1e12, 1e29])
def test_a_fit_of_any_scale_is_finite_or_an_error(std, recwarn):
    try:
        found = fit(F.gelu, ExpansionConfig("hermite", 32), std=std)
    except OrthoFxError as error:
        assert "overflows" in str(error)  # noqa: PT017
    else:
        assert math.isfinite(found.max_error)
    assert not recwarn.list


def test_a_clamp_too_small_for_floats_is_refused():
    with pytest.raises(OrthoFxError, match=r"^clamp times std must be from"):
        fit(F.gelu, ExpansionConfig("hermite", 3, clamp=1e-300))
