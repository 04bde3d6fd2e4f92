"""Values are written to the parameters that learn, under parametrizations and pruning as well."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, calibrate_, param_groups, rewrite_


class Halved(nn.Module):
    def forward(self, a):
        return a / 2

    def right_inverse(self, a):
        return 2 * a


class Halves(nn.Module):
    def forward(self, a, b):
        return a + b

    def right_inverse(self, a):
        return a / 4, 3 * a / 4


class Positive(nn.Module):
    def forward(self, a):
        return a.abs()

    def right_inverse(self, a):
        return a


class OneWay(nn.Module):
    def forward(self, a):
        return a / 2


GRANULARITIES = pytest.mark.parametrize("granularity", ["layer", "channel"])


def rewritten(granularity="channel"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    rewrite_(model, ExpansionConfig("hermite", 3, granularity=granularity), example_inputs=torch.randn(32, 4))
    return model


def measured(model):
    torch.manual_seed(1)
    calibrate_(model, [3 * torch.randn(256, 4)])
    return model[1].coefficients.detach()


@GRANULARITIES
def test_parametrizations_are_inverted(granularity):
    expected = measured(rewritten(granularity))
    for chain in ((Halved,), (Halved, Halved), (Halves,)):
        model = rewritten(granularity)
        for parametrization in chain:
            parametrize.register_parametrization(model[1], "coefficients", parametrization())
        learned = list(model[1].parameters())
        assert_close(measured(model), expected)
        assert all(one is other for one, other in zip(model[1].parameters(), learned, strict=True))
        parametrize.remove_parametrizations(model[1], "coefficients")
        assert_close(model[1].coefficients.detach(), expected)


def test_what_cannot_be_inverted_is_refused_and_nothing_changes():
    told = {
        OneWay: r"^3: coefficients is parametrized by OneWay, which no right_inverse gives these values: .*inverse",
        Positive: r"^3: coefficients is parametrized by Positive, which no right_inverse gives these values$",
    }
    for parametrization, message in told.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU())
        rewrite_(model, "hermite")
        parametrize.register_parametrization(model[3], "coefficients", parametrization(), unsafe=True)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(OrthoFxError, match=message):
            measured(model)
        assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_pruned_coefficients_stay_pruned():
    model = rewritten()
    prune.random_unstructured(model[1], "coefficients", 5)
    mask = model[1].coefficients_mask
    assert_close(measured(model), measured(rewritten()) * mask)
    model(torch.randn(2, 4))
    assert_close(model[1].coefficients.detach(), measured(rewritten()) * mask)
    prune.remove(model[1], "coefficients")
    assert_close(model[1].coefficients.detach(), measured(rewritten()) * mask)


def test_what_is_no_parameter_any_more_is_refused():
    activation = HermiteActivation()
    value = activation.coefficients.detach()
    del activation.coefficients
    activation.coefficients = value
    with pytest.raises(OrthoFxError, match=r"^HermiteActivation: coefficients is computed from other parameters"):
        activation.reset_parameters()


def test_originals_of_parametrizations_do_not_decay():
    for chain in ((Halved,), (Halves,)):
        model = rewritten()
        for parametrization in chain:
            parametrize.register_parametrization(model[1], "coefficients", parametrization())
        groups = {group["name"]: group for group in param_groups(model, lr=1e-3, weight_decay=0.1)}
        assert [id(p) for p in groups["expansions"]["params"]] == [id(p) for p in model[1].parameters()]
        assert groups["expansions"]["weight_decay"] == 0
    model = rewritten()
    prune.random_unstructured(model[1], "coefficients", 5)
    names = [group["name"] for group in param_groups(model, lr=1e-3, weight_decay=0.1)]
    assert names == ["decay", "no_decay", "expansions"]


def test_lazy_modules_have_no_groups_yet():
    model = nn.Sequential(nn.LazyLinear(4), nn.GELU())
    rewrite_(model)
    told = r"^0\.weight has no shape yet: call the model once, for its lazy modules$"
    with pytest.raises(OrthoFxError, match=told):
        param_groups(model, lr=1e-3)
    model(torch.randn(2, 3))
    assert len(param_groups(model, lr=1e-3)) == 3
