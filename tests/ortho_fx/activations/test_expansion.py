import copy
import functools
import pickle

import pytest
import torch

from ortho_fx import (
    FourierActivation,
    HermiteActivation,
    OrthoFxError,
    TropicalActivation,
    TropicalRationalActivation,
)

TIED = functools.partial(FourierActivation, tied=True)
CLASSES = [HermiteActivation, FourierActivation, TIED, TropicalActivation, TropicalRationalActivation]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_are_those_of_the_input(cls, dtype):
    x = torch.randn(2, 3, 4).to(dtype)
    y = cls()(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert y.isfinite().all()


@pytest.mark.parametrize("cls", CLASSES)
def test_every_parameter_gets_a_gradient_that_is_not_zero(cls):
    activation = cls(dtype=torch.float64)
    activation(torch.randn(4096, dtype=torch.float64)).square().sum().backward()
    for name, parameter in activation.named_parameters():
        assert (parameter.grad != 0).all(), name


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_pickles_and_state_dicts_are_equal(cls):
    activation, x = cls(degree=4), torch.randn(16)
    for other in (copy.deepcopy(activation), pickle.loads(pickle.dumps(activation))):
        assert torch.equal(other(x), activation(x))
    fresh = cls(degree=4, init="paper")
    fresh.load_state_dict(activation.state_dict())
    assert torch.equal(fresh(x), activation(x))


@pytest.mark.parametrize("cls", CLASSES)
def test_meta_construction_then_materialisation(cls):
    activation = cls(device="meta").to_empty(device="cpu")
    activation.reset_parameters()
    x = torch.randn(16)
    assert torch.equal(activation(x), cls()(x))


def test_repr_names_degree_and_init():
    assert repr(HermiteActivation(degree=4)) == "HermiteActivation(degree=4, init='stable')"
    assert repr(TIED(degree=4)) == "FourierActivation(degree=4, init='stable', tied=True)"


@pytest.mark.parametrize("cls", [*CLASSES, functools.partial(HermiteActivation, 5)])
def test_inplace_is_taken_and_has_no_effect(cls):
    x = torch.randn(16)
    before, activation = x.clone(), cls(inplace=True)
    assert torch.equal(activation(x), cls()(x))
    assert torch.equal(x, before)
    assert repr(activation) == repr(cls(inplace=False)) == repr(cls())


def test_tied_frequencies_are_one_parameter():
    assert {name: p.numel() for name, p in TIED(4).named_parameters()} == {
        "constant": 1,
        "coefficients": 4,
        "frequencies": 1,
        "phases": 4,
    }
    torch.testing.assert_close(TIED(4)(x := torch.randn(16)), FourierActivation(4)(x))
    with pytest.raises(RuntimeError, match="size mismatch for frequencies"):
        TIED(4).load_state_dict(FourierActivation(4).state_dict())


@pytest.mark.parametrize("cls", CLASSES)
def test_one_expansion_a_channel_or_group(cls):
    x = torch.randn(2, 6, 5, 4)
    per_channel = cls(granularity="channel", channels=6)
    per_group = cls(granularity="group:2", channels=6)
    assert all(p.shape[1] == 6 for p in per_channel.parameters())
    assert all(p.shape[1] == 2 for p in per_group.parameters())
    # All channels start equal, so the result is that of one shared expansion, whichever dimension has the channels.
    for activation in (per_channel, per_group):
        torch.testing.assert_close(activation(x), cls()(x))
        torch.testing.assert_close(activation(x.movedim(1, -1)), cls()(x).movedim(1, -1))
        torch.testing.assert_close(activation(x.to(memory_format=torch.channels_last)), cls()(x))
    fresh = cls(granularity="channel", channels=6, init="paper")
    fresh.load_state_dict(per_channel.state_dict())
    assert torch.equal(fresh(x), per_channel(x))
    with torch.no_grad():
        next(per_channel.parameters())[:, 3] += 1
    changed = (per_channel(x) != cls()(x)).flatten(2).any(2)
    assert changed[:, 3].all()
    assert not changed[:, :3].any()


def test_a_channel_dimension_can_be_named():
    x = torch.randn(2, 4, 4, 4)
    last = HermiteActivation(granularity="channel", channels=4, channel_dim=-1)
    first = HermiteActivation(granularity="channel", channels=4)
    with torch.no_grad():
        last.coefficients[0] = torch.arange(4.0)
        first.coefficients[0] = torch.arange(4.0)
    torch.testing.assert_close(last(x), first(x.movedim(-1, 1)).movedim(1, -1))


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"granularity": "channel"}, None, "granularity 'channel' needs the number of channels"),
        ({"granularity": "group:4", "channels": 6}, None, "6 channels do not divide into 4 groups"),
        ({"granularity": "row"}, None, 'granularity must be "model", "layer", "channel" or "group:N"; got \'row\''),
        ({"clamp": -1.0}, None, "clamp must be a finite number above zero, or None; got -1.0"),
        ({"tied": True}, None, "tied is for the frequencies of fourier; hermite has none"),
        ({"init": "fit"}, None, "init 'fit' needs the function to fit: pass reference=, or let rewrite_ find it"),
        (
            {"granularity": "channel", "channels": 6},
            (2, 5),
            r"HermiteActivation has 6 channels; got shape \(2, 5\)",
        ),
        (
            {"granularity": "channel", "channels": 6, "channel_dim": 1},
            (2, 5, 6),
            r"HermiteActivation has 6 channels in dimension 1; got shape \(2, 5, 6\)",
        ),
    ],
)
def test_wrong_settings_and_shapes_are_named(settings, shape, message):
    with pytest.raises(OrthoFxError, match=f"^{message}$"):
        HermiteActivation(**settings)(torch.randn(shape or (2,)))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_clamp_holds_value_and_gradient_beyond_it(cls):
    activation = cls(clamp=2.0, dtype=torch.float64)
    x = torch.tensor([-50.0, -2.0, 0.5, 2.0, 50.0], dtype=torch.float64, requires_grad=True)
    y = activation(x)
    assert (y[0], y[4]) == (y[1], y[3])
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad[0], grad[4]) == (0, 0)
    assert grad[2] != 0
    assert "bounds" in activation.state_dict()


def test_fit_starts_at_the_reference_again_and_survives_copies():
    activation = HermiteActivation(degree=8, init="fit", reference=torch.nn.LeakyReLU(0.3))
    x = torch.linspace(-2, 2, 101)
    assert (activation(x) - torch.nn.functional.leaky_relu(x, 0.3)).abs().max() < 0.2
    assert not list(activation.children())
    start = activation.coefficients.clone()
    with torch.no_grad():
        activation.coefficients.zero_()
    activation.reset_parameters()
    assert torch.equal(activation.coefficients, start)
    for other in (copy.deepcopy(activation), pickle.loads(pickle.dumps(activation))):
        other.reset_parameters()
        assert torch.equal(other.coefficients, start)


def test_integers_are_refused_by_name():
    with pytest.raises(OrthoFxError, match=r"^HermiteActivation takes a floating-point tensor; got torch\.int64$"):
        HermiteActivation()(torch.arange(3))


def test_autocast_keeps_coefficients_in_float32():
    activation, linear = HermiteActivation(), torch.nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = activation(linear(torch.randn(4, 8)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert activation.coefficients.grad.dtype == torch.float32
