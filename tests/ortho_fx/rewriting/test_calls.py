"""Whatever a model does with an activation module, it can do with the expansion in its place."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, OrthoFxError, calibrate_, freeze_, polynomial_report, revert_, rewrite_


class Named(nn.Module):
    """An activation of somebody's, whose input has a name of its own."""

    def forward(self, hidden_states):
        return F.gelu(hidden_states)


class ByKeyword(nn.Module):
    def __init__(self, act, name):
        super().__init__()
        self.fc, self.act, self.name = nn.Linear(4, 4), act, name

    def forward(self, x):
        return self.act(**{self.name: self.fc(x)})


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.GELU()

    def forward(self, x):
        return self.act.forward(self.fc(x))


@pytest.mark.parametrize(
    "model",
    [ByKeyword(nn.GELU(), "input"), ByKeyword(Named(), "hidden_states"), Direct()],
    ids=["input", "own", "direct"],
)
def test_every_way_to_call_it_is_seen_by_calibration_reports_and_checks(model):
    model, x = copy.deepcopy(model), torch.randn(64, 4)
    config = ExpansionConfig("hermite", 3, init="fit")
    report = rewrite_(model, config, example_inputs=x)
    assert report.check(x).passed
    expected = model.fc(x).mean().item()
    (site,) = calibrate_(model, [x]).sites
    assert (site.mean, site.samples) == (pytest.approx(expected, abs=1e-5), 256)
    assert polynomial_report(model, [x]).sites[0].samples == 256
    y = model(x)
    freeze_(model)
    torch.testing.assert_close(model(x), y)


def test_two_inputs_or_none_are_refused():
    model = nn.Sequential(nn.GELU())
    rewrite_(model)
    for given, told in (({}, "none"), ({"a": torch.ones(1), "b": torch.ones(1)}, "a=, b=")):
        with pytest.raises(OrthoFxError, match=f"^FourierActivation takes one tensor; got {told}$"):
            model[0](**given)
    with pytest.raises(OrthoFxError, match=r"^FourierActivation takes one tensor; got one tensor, a=$"):
        model[0](torch.ones(1), a=torch.ones(1))


def test_hooks_of_the_activation_are_those_of_the_expansion_the_frozen_one_and_of_what_is_put_back():
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.GELU()), []
    act = model[1]
    handles = [
        act.register_forward_pre_hook(lambda module, inputs: seen.append("before")),
        act.register_forward_hook(lambda module, inputs, output: seen.append("after")),
        act.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward")),
    ]

    def run():
        seen.clear()
        model(torch.randn(2, 4)).sum().backward()
        return seen

    expected = ["before", "after", "backward"]
    assert run() == expected
    rewrite_(model)
    assert run() == expected
    model[1].register_forward_hook(lambda module, inputs, output: seen.append("later"))
    freeze_(model)
    assert run() == ["before", "after", "later", "backward"]
    handles[0].remove()
    revert_(model)
    assert model[1] is act
    assert run() == ["after", "later", "backward"]


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.1)


def test_an_optimizer_that_the_model_keeps_and_that_misses_the_parameters_is_named():
    told = (
        "the optimizer policy.optimizer (Adam) was made before the rewrite and does not have the new parameters, "
        "which would not learn: make it anew"
    )
    model = nn.ModuleDict({"policy": Policy()})
    with pytest.warns(UserWarning, match="was made before the rewrite") as caught:
        report = rewrite_(model)
    assert [str(one.message) for one in caught] == [f"ortho_fx: {told}"]
    assert report.notes == (told,)
    assert str(report).endswith(told)


def test_an_optimizer_of_other_parameters_is_not_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    model.optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rewrite_(model).notes == ()


def test_a_model_with_infinite_outputs_is_not_said_to_read_changed_inputs():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True))
    report = rewrite_(model)
    with torch.no_grad():
        model[0].bias.fill_(float("nan"))
    check = report.check(torch.randn(2, 4))
    assert (check.mutations, check.not_finite) == ((), True)
