"""An activation from outside is found, replaced, fitted and put back like one of PyTorch's."""

import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from ortho_fx import ExpansionConfig, OrthoFxError, find_sites, register_activation, revert_, rewrite_
from ortho_fx.passes.vocabulary.targets import BY_NAME, Reference
from tests.kinds import activations_from_outside


def snake(x, frequency=1.0):
    return x + torch.sin(frequency * x).square() / frequency


def snake_(x, frequency=1.0):
    return x.copy_(snake(x, frequency))


def wave(x):
    return x + torch.sin(x) ** 2


class Snake(nn.Module):
    def __init__(self, frequency=1.0):
        super().__init__()
        self.frequency = frequency

    def forward(self, x):
        return snake(x, self.frequency)


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), snake

    def forward(self, x):
        return self.act(snake(self.linear(x), frequency=0.5))


@pytest.fixture(autouse=True)
def forgotten():
    with activations_from_outside():
        yield


def test_modules_functions_and_attributes_are_found_with_their_settings():
    model = nn.Sequential(Snake(0.5), Calls(), Snake())
    assert [site.name for site in find_sites(model) if not site.reason] == []
    register_activation("snake", snake, modules=(Snake,), in_place=(snake_,), settings=("frequency",))
    x = torch.randn(64, 4)
    expected = model(x)
    report = rewrite_(model, ExpansionConfig("fourier", 8, init="fit"))
    assert [(site.name, site.kind, site.function) for site in report.replaced] == [
        ("0", "module", "snake"),
        ("2", "module", "snake"),
        ("1.act", "attribute", "snake"),
        ("1.snake_expansion_0", "function", "snake"),
    ]
    assert (str(model[0].reference), str(model[2].reference)) == ("snake(frequency=0.5)", "snake(frequency=1.0)")
    assert str(model[1].snake_expansion_0.reference) == "snake(frequency=0.5)"
    assert report.check(x).passed
    assert (model(x) - expected).abs().mean() < 0.05
    revert_(model)
    assert torch.equal(model(x), expected)


def test_targets_name_it_and_a_gate_stays_unless_named():
    register_activation("snake", snake, modules=(Snake,), settings=("frequency",), gate=True)
    model = nn.Sequential(Snake(), nn.ReLU())
    assert [site.reason for site in find_sites(model)] == ["it is a gate unless it is named as a target", ""]
    assert [site.name for site in rewrite_(model, targets=["snake"]).replaced] == ["0"]


def test_a_class_that_nobody_named_is_known_by_what_it_computes():
    class Unnamed(nn.Module):
        def forward(self, x):
            return x + torch.sin(x) ** 2

    assert all(site.reason for site in find_sites(nn.Sequential(Unnamed())))
    register_activation("snake", snake, settings=("frequency",))
    assert [site.function for site in find_sites(nn.Sequential(Unnamed())) if not site.reason] == ["snake"]


def test_nodes_of_a_graph_and_the_hook():
    register_activation("snake", snake, modules=(Snake,), settings=("frequency",))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, Snake) or super().is_leaf_module(module, name)

    model = nn.Sequential(nn.Linear(4, 4), Snake())
    graph = fx.GraphModule(model, Tracer().trace(model))
    assert [site.name for site in rewrite_(graph).replaced] == ["1"]
    torch.compile(model, backend="ortho_fx")(torch.randn(2, 4))
    assert type(model[1]).__name__ == "FourierActivation"


def test_a_file_that_names_an_unknown_activation_says_so():
    reference = pickle.loads(pickle.dumps(Reference("serpent")))
    with pytest.raises(OrthoFxError, match=r"^activation 'serpent' is not known here: call register_activation first$"):
        reference(torch.zeros(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gelu", wave), "activation 'gelu' is registered already; known are relu, "),
        (("Snake", wave), "the name of an activation must be an identifier in lower case; got 'Snake'"),
        (("mine", F.gelu), "gelu is a function of activation 'gelu' already"),
        (
            ("mine", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
            "<lambda> computes gelu(approximate='none')",
        ),
        (("mine", lambda x: 2 * x + 1), "<lambda> is linear, so it is no activation"),
        (("mine", lambda x: x / x.sum()), "<lambda> is not elementwise, so it can be no activation"),
        (("mine", lambda x: x.sum()), "<lambda> must return a finite tensor of the shape of its input"),
        (("mine", lambda x: torch.log(x)), "<lambda> must return a finite tensor of the shape of its input"),
        (("mine", 3), "functions of activation 'mine' must be callable; got 3"),
    ],
)
def test_what_cannot_be_registered_is_named_and_changes_nothing(arguments, message):
    with pytest.raises(OrthoFxError, match=f"^{re.escape(message)}"):
        register_activation(*arguments)
    assert arguments[0] == "gelu" or arguments[0] not in BY_NAME


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": (nn.ReLU,)}, "ReLU is a module of activation 'relu' already"),
        (
            {"modules": (snake,)},
            "modules of activation 'snake' must be classes of torch.nn.Module; got <fun",
        ),
        ({"settings": ("beta",)}, "snake takes no argument 'beta', a setting of activation 'snake'"),
        ({"functions": (torch.cos,)}, "cos and snake differ by"),
    ],
)
def test_modules_settings_and_further_functions_are_checked(settings, message):
    with pytest.raises(OrthoFxError, match=f"^{re.escape(message)}"):
        register_activation("snake", snake, **settings)
    assert "snake" not in BY_NAME
