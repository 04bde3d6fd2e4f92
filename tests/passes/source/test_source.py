"""Calls in a module's own source are found and replaced in place, and nothing else changes."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import gelu as imported_gelu

from ortho_fx import ExpansionActivation, OrthoFxError, find_sites, rewrite_
from ortho_fx.passes.source import Source, find_calls, rewrite_class


def wrapped(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return wrapper


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.__private = 2.0

    @wrapped
    def forward(self, x: "torch.Tensor", residual=None, *, power=1):
        h = F.gelu(self.linear(x), approximate="tanh") * self.__private**power
        if residual is not None:
            h = h + residual.relu()
        for _ in range(2):
            h = F.dropout(imported_gelu(input=h), 0.5, training=self.training)
        h = h + 1
        F.relu(h, inplace=True)
        return self._tail(h) + nn.SiLU()(h) + torch.sigmoid(h)

    @torch.no_grad()
    def _tail(self, x):
        """A string that is
        indented less than the code."""
        return torch.nn.functional.silu(x)


class Child(Everything):
    def forward(self, x):
        return super().forward(F.mish(x), power=2)


def test_every_way_of_calling_is_found_in_order():
    assert [(call.attribute, call.kind, call.problem) for call in find_calls(Source(Everything))] == [
        ("gelu_expansion_0", "function", ""),
        ("relu_expansion_0", "method", ""),
        ("gelu_expansion_1", "function", ""),
        ("relu_expansion_1", "function", ""),
        ("silu_expansion_0", "built in forward", ""),
        ("sigmoid_expansion_0", "function", ""),
        ("silu_expansion_1", "function", ""),
    ]


class Recorder(ExpansionActivation):
    """Takes the place of an expansion but computes the old function, so a rewritten module must agree with the old."""

    def __init__(self, function):
        nn.Module.__init__(self)
        self.function, self.calls = function, 0

    def forward(self, x):
        self.calls += 1
        return self.function(x)


FUNCTIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "mish": F.mish, "sigmoid": torch.sigmoid}


def recorded(module):
    """The module with every call in its source replaced by the same function."""
    copied = copy.deepcopy(module)
    names = [call.attribute for call in find_calls(Source(type(module)))]
    for name in names:
        copied.add_module(name, Recorder(FUNCTIONS[name.split("_")[0]]))
    copied.__class__ = rewrite_class(Source(type(module), replaced=frozenset(names)))
    return copied


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_rewritten_method_computes_the_same_apart_from_the_calls(training, residual):
    module = Everything().double().train(training)
    new, x = recorded(module), torch.randn(3, 4, dtype=torch.float64)
    keywords = {"residual": x.clone()} if residual else {}
    torch.manual_seed(0)
    expected = module(x, **keywords, power=3)
    torch.manual_seed(0)
    # The recorder computes the exact GELU, and the module the tanh approximation; outputs differ by less than 1e-2.
    torch.testing.assert_close(new(x, **keywords, power=3), expected, rtol=0.05, atol=0.05)
    calls = {name: child.calls for name, child in new.named_children() if isinstance(child, Recorder)}
    assert calls == {
        "gelu_expansion_0": 1,
        "relu_expansion_0": int(residual),
        "gelu_expansion_1": 2,
        "relu_expansion_1": 1,
        "silu_expansion_0": 1,
        "silu_expansion_1": 1,
        "sigmoid_expansion_0": 1,
    }


def test_an_in_place_call_leaves_its_result_in_the_name():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x * 1
            z = F.relu_(y)
            return y + z

    x = torch.randn(8)
    assert torch.equal(recorded(InPlace())(x), 2 * F.relu(x))


def test_what_a_module_is_stays():
    module = Everything()
    keys = set(module.state_dict())
    rewrite_(module)
    assert isinstance(module, Everything)
    assert type(module).__name__ == "Everything"
    assert keys < set(module.state_dict())
    x = torch.randn(3, 4)
    module.eval()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert torch.equal(other(x), module(x))


def test_instances_of_a_class_share_the_rewritten_class():
    first, second = Everything(), Everything()
    rewrite_(first)
    rewrite_(second)
    assert type(first) is type(second) is not Everything


def test_an_instance_that_is_left_alone_computes_as_before():
    first, second = Everything().eval(), Everything().eval()
    x = torch.randn(3, 4)
    before = second(x)
    rewrite_(first)
    assert torch.equal(second(x), before)


def test_calls_that_only_super_reaches_are_reported_and_the_others_replaced():
    child = Child()
    report = rewrite_(child)
    assert [site.name for site in report.replaced] == ["mish_expansion_0", "silu_expansion_1"]
    assert {site.reason for site in report.left} == {"forward is called through super()"}
    assert len(report.left) == 6
    child(torch.randn(3, 4))
    with pytest.raises(OrthoFxError, match="gelu_expansion_0 of Child cannot be replaced: forward is called through"):
        rewrite_class(Source(Child, replaced=frozenset({"gelu_expansion_0"})))


def test_calls_of_children_are_not_the_owners():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Everything()

        def forward(self, x):
            return self.child(x)

    assert not find_calls(Source(Parent))


def test_rewritten_modules_compile_in_one_graph():
    module = Everything().eval()
    rewrite_(module)
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


def test_source_that_is_missing_or_not_what_runs_is_reported(tmp_path):
    namespace = {"nn": nn, "F": F}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return F.gelu(x)\n", namespace)
    (site,) = find_sites(namespace["Typed"]())
    assert (site.function, site.reason) == ("gelu", "the source of forward is not available")

    class Edited(nn.Module):
        def forward(self, x):
            return F.gelu(x)

    Edited.forward.__code__ = Edited.forward.__code__.replace(co_consts=(None,), co_names=("F", "silu"))
    (site,) = find_sites(Edited())
    assert site.reason == "the source of forward is not the code that runs"
    with pytest.raises(OrthoFxError, match=r"^no activation of Edited can be replaced: gelu_expansion_0: the source"):
        rewrite_(Edited())


def test_a_wrapper_that_hides_its_function_is_reported():
    class Holder:
        def __init__(self, function):
            self.function = function

        def __call__(self, *args):
            return self.function(*args)

    def hidden(function):
        holder = Holder(function)

        @functools.wraps(function)
        def wrapper(self, x):
            return holder(self, x)

        return wrapper

    class Decorated(nn.Module):
        @hidden
        def forward(self, x):
            return F.gelu(x)

    (site,) = find_sites(Decorated())
    assert site.reason == "forward is wrapped by a decorator that does not close over it"


def test_an_input_that_is_not_one_argument_is_reported():
    class Starred(nn.Module):
        def forward(self, *args):
            return F.gelu(*args)

    (site,) = find_sites(Starred())
    assert site.reason == "its input is not a plain argument"


def test_a_pickle_of_a_call_that_is_gone_names_it():
    with pytest.raises(OrthoFxError, match="the source of Child has no activation call selu_expansion_0"):
        rewrite_class(Source(Child, replaced=frozenset({"selu_expansion_0"})))
