"""Every activation that may run is listed, whichever way the code comes to it."""

import functools
import types
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import find_sites, revert_, rewrite_

GLOBAL = {"a": F.relu, "b": F.silu}
LATER = "which activation it calls is known only when it runs"


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.GELU()

    def forward(self, x):
        return self.act(self.linear(x))


class Encode(Base):
    def encode(self, x):
        return F.relu(self.linear(x))


class Private(Base):
    def _encode(self, x):
        return self.linear(x).relu()


class Overridden(Encode):
    def encode(self, x):
        return Encode.encode(self, x)


class Named(Base):
    mode = "train"

    def forward_train(self, x):
        return F.relu(self.linear(x))

    def forward(self, x):
        return getattr(self, f"forward_{self.mode}")(x)


class Property(Base):
    @property
    def function(self):
        return F.relu

    def forward(self, x):
        return self.function(self.linear(x))


class Computed(Base):
    @functools.cached_property
    def scale(self):
        return F.relu(self.linear.weight)


class ClassMethod(Base):
    @classmethod
    def squash(cls, x):
        return F.relu(x)

    def forward(self, x):
        return self.squash(self.linear(x))


class StaticMethod(Base):
    @staticmethod
    def squash(x):
        return F.relu(x).flip(0)


class OfInstance(Base):
    def __init__(self):
        super().__init__()
        self.forward = self.run

    def run(self, x):
        return F.relu(self.linear(x))


def replacement(self, x):
    return F.relu(self.linear(x)).flip(0)


class Bound(Base):
    def __init__(self):
        super().__init__()
        self.forward = types.MethodType(replacement, self)


class Partial(Base):
    def __init__(self):
        super().__init__()
        self.forward = functools.partial(replacement, self)


class DefaultArgument(Base):
    def forward(self, x, function=F.relu):
        return function(self.linear(x))


class Dict(Base):
    def __init__(self):
        super().__init__()
        self.kinds, self.kind = {"relu": F.relu}, "relu"

    def forward(self, x):
        return self.kinds[self.kind](self.linear(x))


class Nested(Base):
    def __init__(self):
        super().__init__()
        self.kinds = [("first", torch.relu)]


@dataclass
class Settings:
    act: object = F.relu
    others: list = field(default_factory=list)


class Config(Base):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(inner=types.SimpleNamespace(act=F.relu))


class Dataclass(Base):
    def __init__(self):
        super().__init__()
        self.config = Settings()


class OfClass(Base):
    kinds = (F.relu,)

    def forward(self, x):
        for function in self.kinds:
            x = function(x)
        return x


class Kept(Base):
    def __init__(self):
        super().__init__()
        self.layer = nn.ReLU

    def forward(self, x):
        return self.layer()(self.linear(x))


class LocalImport(Base):
    def forward(self, x):
        import torch.nn.functional as functional

        return functional.relu(self.linear(x))


class LocalName(Base):
    def forward(self, x):
        from torch import relu as squash

        return squash(self.linear(x))


class ByMethodName(Base):
    def forward(self, x):
        return getattr(self.linear(x), "relu")()  # noqa: B009


@pytest.mark.parametrize(
    "cls",
    [
        *(
            Encode,
            Private,
            Overridden,
            Named,
            Property,
            Computed,
            ClassMethod,
            StaticMethod,
            OfInstance,
            Bound,
            Partial,
        ),
        *(DefaultArgument, Dict, Nested, Config, Dataclass, OfClass, Kept, LocalImport, LocalName, ByMethodName),
    ],
)
def test_what_may_run_is_listed(cls):
    sites = [site for site in find_sites(cls()) if site.function == "relu"]
    assert len(sites) == 1
    assert sites[0].reason or cls in (LocalImport, LocalName)


class Global(Base):
    def forward(self, x, kind="a"):
        return GLOBAL[kind](self.linear(x))


class Loop(Base):
    def forward(self, x):
        for function in GLOBAL.values():
            x = function(x)
        return x


class Assigned(Base):
    def forward(self, x, kind="a"):
        function = GLOBAL[kind]
        return function(x)


class Lookup(Base):
    def forward(self, x, kind="relu"):
        function = getattr(F, kind)
        return function(x)


@pytest.mark.parametrize("cls", [Global, Loop, Assigned, Lookup])
def test_what_is_chosen_when_it_runs_is_listed_as_an_activation(cls):
    sites = [(site.function, site.reason) for site in find_sites(cls()) if site.kind == "function"]
    assert sites == [("activation", LATER)]


def reasons(module):
    return {site.name: site.reason for site in find_sites(module)}


def test_the_reasons_name_the_way():
    assert reasons(Encode())["relu_expansion_0"] == "forward does not reach encode by its name"
    assert reasons(Overridden())["relu_expansion_0"] == "encode is called through super()"
    assert reasons(ClassMethod())["relu_expansion_0"] == (
        "squash is a class method, which has no module to keep an expansion"
    )
    assert reasons(Computed())["relu_expansion_0"] == "scale is a property"
    assert reasons(Dict())["kinds['relu']"] == "it is kept in a dict, in which nothing is exchanged"
    assert reasons(Dataclass())["config.act"] == "it is kept in a Settings, in which nothing is exchanged"
    assert reasons(Kept())["layer"] == "it is a class, and where its instances are made is not known"
    assert reasons(DefaultArgument())["relu_expansion_0"] == (
        "it is the default of the argument function, and what that is when it is called is not known"
    )


def test_the_call_of_a_module_is_a_way_to_it():
    class Calling(Base):
        def __call__(self, x):
            return F.relu(super().__call__(x))

    module, x = Calling(), torch.randn(3, 4)
    report = rewrite_(module)
    assert [site.name for site in report.replaced] == ["relu_expansion_0", "act"]
    module(x)
    assert report.check(x).passed


class Two(Base):
    def forward(self, x):
        return F.relu(self.linear(x))

    def infer(self, x):
        return F.relu(self.linear(x))


def test_another_way_into_a_module_keeps_its_activation_and_is_listed():
    module, x = Two(), torch.randn(3, 4)
    expected = module.infer(x)
    report = rewrite_(module, targets=["relu"])
    assert [(site.name, site.reason) for site in report.sites if site.function == "relu"] == [
        ("relu_expansion_0", ""),
        ("relu_expansion_1", "forward does not reach infer by its name"),
    ]
    assert torch.equal(module.infer(x), expected)


class Bijection(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, 0.5)

    def inverse(self, x):
        return F.leaky_relu(x, 2.0)


def test_a_module_with_other_methods_than_forward_is_not_exchanged():
    module, x = nn.Sequential(nn.Linear(4, 4), Bijection(), nn.GELU()), torch.randn(3, 4)
    report = rewrite_(module)
    assert [(site.name, site.reason) for site in report.left] == [
        ("1", "it also has inverse, which an expansion in its place would not have")
    ]
    torch.testing.assert_close(module[1].inverse(module[1](x)), x)


class WithDefault(nn.Module):
    activation = None

    def __init__(self):
        super().__init__()
        self.activation = F.gelu

    def forward(self, x):
        return self.activation(x)


def test_a_function_over_a_default_of_the_class_is_left():
    (site,) = find_sites(WithDefault())
    assert site.reason == "WithDefault has an attribute activation as well, which would hide a child of that name"


class OverModule(nn.Module):
    act = nn.GELU()

    def __init__(self, own):
        super().__init__()
        if own:
            vars(self)["act"] = F.relu

    def forward(self, x):
        return self.act(x)


def test_what_the_instance_has_goes_before_what_the_class_has():
    assert [(s.function, s.reason) for s in find_sites(OverModule(False))] == [("gelu", "")]
    sites = {site.function: site.reason for site in find_sites(OverModule(True))}
    assert sites["gelu"] == "the instance has an attribute act of its own, which is not the class'"
    assert sites["relu"]


def test_setup_is_no_use_of_an_activation():
    class Setup(Base):
        def __init__(self):
            super().__init__()
            self.other = self._make("relu")

        def _make(self, kind):
            return {"relu": F.relu, "gelu": F.gelu}[kind]

        def _init_weights(self, module):
            self.linear.weight.data = F.softplus(self.linear.weight.data)

    assert sorted(site.name for site in find_sites(Setup())) == ["act", "other"]


def test_an_overridden_method_of_the_instance_is_not_the_class():
    module = Two()
    module.infer = types.MethodType(replacement, module)
    sites = {site.name: site.reason for site in find_sites(module)}
    assert sites["relu_expansion_1"] == "the instance has an attribute infer of its own, which is not the class'"
    assert sites["infer"]


def test_what_was_listed_does_not_change_what_is_put_back():
    module, x = Two(), torch.randn(3, 4)
    expected = module(x)
    rewrite_(module)
    revert_(module)
    assert type(module) is Two
    assert torch.equal(module(x), expected)


def test_hooks_scripted_functions_operators_and_parametrizations_are_listed():
    scripted = torch.jit.script(activated_sum)

    class Positive(nn.Module):
        def forward(self, x):
            return F.relu(x)

    class Many(Base):
        def __init__(self):
            super().__init__()
            self.register_forward_hook(lambda module, inputs, output: F.silu(output).flip(0))
            nn.utils.parametrize.register_parametrization(self.linear, "weight", Positive())

        def forward(self, x):
            x = scripted(self.linear(x), x)
            return self.act(torch.ops.aten.relu(x) + torch.Tensor.relu(x))

    sites = {site.name: site.reason for site in find_sites(Many())}
    assert sites == {
        "relu_expansion_0": "",
        "relu_expansion_1": "",
        "mish_expansion_0": "scripted code cannot be rewritten",
        "_forward_hooks[0]": "it is called by a hook of the module",
        "act": "",
        "linear.parametrizations.weight.0": (
            "it keeps a parameter positive, and it stays unless it is named as a target"
        ),
    }


def activated_sum(x, y):
    return F.mish(x + y)
