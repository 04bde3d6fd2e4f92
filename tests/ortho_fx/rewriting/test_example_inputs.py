"""`rewrite_` with example inputs: fits, calibration and channels."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, gains, rewrite_
from ortho_fx.bases import BASES


class Network(nn.Module):
    """Every kind of site, in both layouts."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.linear, self.function, self.last = nn.Linear(6, 8), F.silu, nn.Linear(8, 2)
        self.leaky = nn.LeakyReLU(0.2)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = self.function(self.linear(x.permute(0, 2, 3, 1)))
        x = F.gelu(self.last(x), approximate="tanh")
        return self.leaky(nn.ELU(alpha=0.5)(x))


def network():
    torch.manual_seed(0)
    return Network().double()


X = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "config", [ExpansionConfig("hermite", 24, "fit"), ExpansionConfig("fourier", 16, "fit")], ids=str
)
def test_a_close_fit_leaves_the_model_as_it_was(config):
    model = network()
    with torch.no_grad():
        expected = model(X)
    report = rewrite_(model, config, example_inputs=X)
    assert [site.function for site in report.replaced] == ["silu", "gelu", "elu", "relu", "leaky_relu"]
    assert all(site.fit_rmse < 0.05 for site in report.replaced)
    assert model.leaky.reference.settings == (("negative_slope", 0.2),)
    assert (model(X) - expected).square().mean().sqrt() < 0.03 * expected.std()


def test_piecewise_linear_activations_are_met_exactly():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Hardswish()).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    expected = model[:4](x)
    rewrite_(model, ExpansionConfig("tropical", 5, "fit"), example_inputs=x)
    torch.testing.assert_close(model[:4](x), expected)


def test_the_report_states_the_error_of_each_fit():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.SiLU())
    report = rewrite_(model, ExpansionConfig("hermite", 3, "fit"))
    assert [site.fit_rmse for site in report.sites] == pytest.approx([0.0782, 0.0392], abs=1e-4)
    assert str(report).splitlines()[0].endswith("parameters  fit rmse")
    assert str(report).splitlines()[1].split()[-1] == "0.078"


def test_measured_fits_are_closer_where_the_inputs_are():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))

    x = 0.3 * torch.randn(512, 16)
    expected = make()(x)
    errors = []
    for inputs in (None, x):
        model = make()
        rewrite_(model, ExpansionConfig("hermite", 4, "fit"), example_inputs=inputs)
        errors.append((model(x) - expected).square().mean().sqrt().item())
    assert errors[1] < 0.1 * errors[0]


def test_calibrated_starts_for_the_inputs_in_the_rewritten_model():
    model = network().eval()
    rewrite_(model, ExpansionConfig("hermite", 3, "calibrated"), example_inputs=(X,))
    seen = []
    model.act.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(X)
    mean, std = seen[0].mean().item(), seen[0].std(correction=0).item()
    result = gains(model.act, mean, std)
    # The norm still has the running statistics of its initialisation.
    assert (result.forward, result.backward) == pytest.approx((1, 1), abs=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_channels_are_those_of_the_layers_before(name):
    model = network()
    report = rewrite_(model, ExpansionConfig(name, granularity="channel"), example_inputs=X)
    assert not report.left
    widths = {site.name: model.get_submodule(site.name) for site in report.replaced}
    assert {key: (e.channels, e.channel_dim) for key, e in widths.items()} == {
        "act": (6, 1),
        "function": (8, -1),
        "gelu_expansion_0": (2, -1),
        "elu_expansion_0": (2, -1),
        "leaky": (2, -1),
    }
    same = network()
    rewrite_(same, ExpansionConfig(name))
    torch.testing.assert_close(model(X), same(X))
    model(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(X), model(X))
    fresh = network()
    rewrite_(fresh, ExpansionConfig(name, granularity="channel"), example_inputs=X)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(X), model(X))


def test_channels_compile_in_both_layouts():
    model = network().float()
    rewrite_(model, ExpansionConfig("hermite", granularity="channel"), example_inputs=X.float())
    for module in model.modules():
        if isinstance(module, HermiteActivation):
            with torch.no_grad():
                module.coefficients += 0.1 * torch.randn_like(module.coefficients)
    x = X.float().to(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_does_not_divide_is_left_with_the_reason():
    model = network()
    report = rewrite_(model, ExpansionConfig(granularity="group:4"), example_inputs=X)
    assert {site.name: site.reason for site in report.left} == {
        "act": "6 channels do not divide into 4 groups",
        "gelu_expansion_0": "2 channels do not divide into 4 groups",
        "elu_expansion_0": "2 channels do not divide into 4 groups",
        "leaky": "2 channels do not divide into 4 groups",
    }


def test_arguments_that_are_not_constants_cannot_be_fitted():
    class Sloped(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope, self.act = [0.3], nn.GELU()

        def forward(self, x):
            return self.act(F.leaky_relu(x, self.slope[0]))

    (left,) = rewrite_(Sloped(), ExpansionConfig(init="fit")).left
    assert left.reason == "its arguments are known only when it runs, and init 'fit' needs them before"
    assert not rewrite_(Sloped()).left


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (
            ExpansionConfig(granularity="channel"),
            None,
            r"granularity 'channel' needs a batch to run: call rewrite_\(model, config, example_inputs=\.\.\.\)",
        ),
        (ExpansionConfig(init="calibrated"), None, "init 'calibrated' needs a batch to run"),
        (ExpansionConfig(init="calibrated"), torch.zeros(2, 4), r"the inputs of 1 are constant \(0\)"),
        (ExpansionConfig(init="fit"), torch.zeros(2, 4), r"1: samples are constant \(0\)"),
        (ExpansionConfig(init="fit"), torch.full((2, 4), torch.nan), "1: samples are not finite"),
    ],
)
def test_mistakes_are_named_and_leave_the_model_as_it_was(config, inputs, message):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.GELU())
    before = repr(model)
    with pytest.raises(OrthoFxError, match=f"^{message}"):
        rewrite_(model, config, example_inputs=inputs)
    assert repr(model) == before


def test_a_batch_that_the_model_cannot_take_leaves_it_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    with pytest.raises(RuntimeError):
        rewrite_(model, ExpansionConfig(init="fit"), example_inputs=torch.randn(2, 5))
    assert isinstance(model[1], nn.GELU)
