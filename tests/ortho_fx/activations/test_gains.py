import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ortho_fx import ExpansionConfig, OrthoFxError, gains
from ortho_fx.activations.expansion import make_activation
from tests.kinds import KINDS, basis_of, config_of

pytestmark = pytest.mark.slow


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(KINDS)),
    degree=st.integers(1, 8),
    mean=st.floats(-1, 1),
    std=st.floats(0.3, 2),
    seed=st.integers(0, 1000),
)
def test_closed_forms_agree_with_quadrature_wherever_the_coefficients_have_got_to(name, degree, mean, std, seed):
    torch.manual_seed(seed)
    activation = make_activation(config_of(name, degree), dtype=torch.float64)
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    closed = gains(activation, mean, std)
    # A lambda hides the class, so this is quadrature and autograd.
    numeric = gains(lambda x: activation(x), mean, std)
    assert (closed.forward, closed.backward, closed.slope) == pytest.approx(
        (numeric.forward, numeric.backward, numeric.slope), rel=1e-7, abs=1e-7
    )


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(KINDS)),
    degree=st.integers(1, 8),
    clamp=st.floats(0.2, 6),
    mean=st.floats(-1, 1),
    std=st.floats(0.3, 3),
    seed=st.integers(0, 1000),
)
def test_clamped_moments_agree_with_quadrature(name, degree, clamp, mean, std, seed):
    torch.manual_seed(seed)
    activation = make_activation(config_of(name, degree, clamp=clamp), dtype=torch.float64)
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    closed = gains(activation, mean, std)
    numeric = gains(lambda x: activation(x), mean, std)
    assert (closed.forward, closed.backward, closed.slope) == pytest.approx(
        (numeric.forward, numeric.backward, numeric.slope), rel=1e-7, abs=1e-7
    )


@pytest.mark.parametrize(
    ("granularity", "clamp"), [("layer", None), ("channel", None), ("group:3", None), ("layer", 2.5), ("group:3", 2.5)]
)
@pytest.mark.parametrize("name", KINDS)
def test_stable_modules_have_gains_of_one_whatever_their_settings(name, granularity, clamp):
    for degree in (1, 5) if clamp else (1, 8, basis_of(name).degrees[-1]) if granularity == "layer" else (3,):
        config = config_of(name, degree, granularity=granularity, clamp=clamp)
        result = gains(make_activation(config, channels=6, dtype=torch.float64))
        assert abs(result.forward - 1) < 1e-9
        assert abs(result.backward - 1) < 1e-9
        assert abs(result.slope) < 1 or (degree == 1 and clamp is None and basis_of(name).is_polynomial)


@pytest.mark.parametrize("name", KINDS)
def test_gains_of_a_config_are_those_of_its_initial_parameters(name):
    config = config_of(name, 3, granularity="group:3", clamp=2.5)
    module = make_activation(config, channels=6, dtype=torch.float64)
    assert dataclasses.astuple(gains(config)) == pytest.approx(dataclasses.astuple(gains(module)))


def test_gains_of_groups_are_the_means_over_them():
    shared = [make_activation(ExpansionConfig("hermite", 3, init), dtype=torch.float64) for init in ("stable", "paper")]
    config = ExpansionConfig("hermite", 3, granularity="group:2")
    both = make_activation(config, channels=4, dtype=torch.float64)
    with torch.no_grad():
        both.coefficients.copy_(torch.stack([activation.coefficients for activation in shared], 1))
    assert gains(both).slope == pytest.approx(sum(gains(activation).slope for activation in shared) / 2)


def test_a_clamp_makes_the_basin_unbounded():
    assert gains(ExpansionConfig("hermite", 3)).basin < 4
    assert gains(ExpansionConfig("hermite", 3, clamp=2.0)).basin == math.inf


def test_gains_of_known_functions():
    relu = gains(F.relu)
    assert (relu.forward, relu.backward, relu.slope) == pytest.approx((0.5, 0.5, 0.5), abs=1e-7)
    identity = gains(nn.Identity(), mean=0.0, std=3.0)
    assert (identity.forward, identity.backward, identity.slope) == pytest.approx((1, 1, 1), abs=1e-9)
    square = gains(lambda x: x * x)
    assert (square.forward, square.backward) == pytest.approx((3, 4), abs=1e-9)
    assert gains(lambda x: math.sqrt(2) * F.relu(x)).forward == pytest.approx(1, abs=1e-7)


def test_basins():
    # Fourier is bounded, so its basin is infinite; a cubic is not bounded. There is no basin if 1 is no fixed point or
    # repels.
    assert gains(ExpansionConfig("fourier", 5)).basin == math.inf
    assert 3 < gains(ExpansionConfig("hermite", 3)).basin < 4
    assert 2.8 < gains(ExpansionConfig("relu_squared_series", 3)).basin < 3.2
    assert gains(ExpansionConfig("hermite", 3, "paper")).basin == 0
    assert gains(F.gelu).basin == 0


@pytest.mark.parametrize(("name", "degree"), [("hermite", 3), ("hermite", 8), ("tropical", 5)])
def test_the_layer_map_returns_from_inside_the_basin_and_from_outside_not(name, degree):
    activation = make_activation(ExpansionConfig(name, degree), dtype=torch.float64)
    basin = gains(activation).basin
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    weight = torch.exp(-z * z / 2)
    weight /= weight.sum()
    for start, returns in ((0.1 * basin, True), (0.93 * basin, True), (1.07 * basin, False)):
        q = torch.tensor(start, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(500):
                q = (weight * activation(q.sqrt() * z).square()).sum()
        assert bool((q - 1).abs() < 0.01) == returns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((F.relu, 0.0, 0.0), "mean must be finite and std finite and above zero; got 0.0 and 0.0"),
        ((F.relu, math.nan), "mean must be finite and std finite and above zero; got nan and 1.0"),
        ((torch.sqrt,), r"sqrt returns NaN at x = -\d"),
        ((torch.sum,), r"sum must return a tensor of its input's shape \(2160,\); got \(\)"),
        ((torch.detach,), "detach returns a tensor without a gradient"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(OrthoFxError, match=f"^{message}"):
        gains(*arguments)
