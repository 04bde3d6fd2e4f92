"""Looking for activations runs no code of the model's author, and sees what names mean now."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import find_sites, rewrite_

LOG = []
MAP = {"gelu": nn.GELU, "silu": nn.SiLU}


def activate_license(key):
    LOG.append(key)
    return lambda x: x


def make_act(kind):
    LOG.append(kind)
    return MAP[kind]()


def plain_act(kind):
    return MAP[kind]()


class Made(nn.Module):
    def __init__(self, size=1):
        super().__init__()
        LOG.append(size)

    def forward(self, x):
        return x


class Swish(Made):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Table(dict):
    def __missing__(self, key):
        LOG.append(key)
        return F.gelu

    def __getitem__(self, key):
        LOG.append(key)
        return F.gelu


TABLE = Table(gelu=F.gelu)


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.kind = "gelu"

    @property
    def chosen(self):
        LOG.append("property")
        return "gelu"

    def __getattr__(self, name):
        if name == "unknown":
            LOG.append(name)
        return super().__getattr__(name)

    def forward(self, x):
        h = Made(10)
        x = activate_license("key")(h(x)) + make_act("gelu")(x) + Swish()(x) + TABLE["gelu"](x)
        return plain_act(self.kind)(x) + MAP[self.chosen]()(x) + MAP[self.unknown]()(x)


def test_looking_runs_no_code_of_the_model():
    module = Running()
    LOG.clear()
    sites = [(site.function, site.kind, bool(site.reason)) for site in find_sites(module)]
    assert LOG == []
    assert sites == [
        ("activation", "function", True),
        ("activation", "built in forward", True),
        ("activation", "function", True),
        ("gelu", "built in forward", False),
        ("activation", "function", True),
        ("activation", "function", True),
    ]


def test_activations_that_are_built_in_forward_draw_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    find_sites(Running())
    assert torch.equal(torch.randn(3), expected)


class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise ImportError(f"{name} needs a package")


class Refusing(type):
    def __getattr__(cls, name):
        raise RuntimeError(name)


class Holder(metaclass=Refusing):
    pass


class Unhashable:
    def __hash__(self):
        raise ValueError

    def __eq__(self, other):
        raise ValueError


lazy, unhashable = Lazy("lazy"), Unhashable()


class Names(nn.Module):
    def __init__(self, fast=False):
        super().__init__()
        self.fast, self.odd = fast, unhashable

    def forward(self, x):
        if self.fast:
            x = torch.classes.no_library.Engine(4)(x) + lazy.gelu(x) + Holder.gelu(x) + unhashable(x)
        return F.gelu(x)


def test_names_whose_lookup_raises_are_passed_over():
    assert [(site.function, site.reason) for site in find_sites(Names())] == [("gelu", "")]
    rewrite_(Names())


act = F.relu


def inner(x):
    return F.relu(x).flip(0)


def outer(x):
    return inner(x) + 1


class Changing(nn.Module):
    def forward(self, x):
        return act(x)


class Calling(nn.Module):
    def forward(self, x):
        return outer(x)


def functions(module):
    return [site.function for site in find_sites(module)]


def test_a_global_that_is_set_anew_is_seen(monkeypatch):
    assert functions(Changing()) == ["relu"]
    monkeypatch.setattr(sys.modules[__name__], "act", F.gelu)
    assert functions(Changing()) == ["gelu"]
    assert [site.function for site in rewrite_(Changing()).replaced] == ["gelu"]


def test_a_function_that_is_defined_again_is_seen(monkeypatch):
    assert functions(Calling()) == ["relu"]
    monkeypatch.setattr(sys.modules[__name__], "inner", lambda x: x + 1)
    assert functions(Calling()) == []
    monkeypatch.setattr(sys.modules[__name__], "inner", lambda x: F.silu(x).flip(0))
    assert functions(Calling()) == ["silu"]


def test_a_method_that_is_set_anew_is_seen(monkeypatch):
    assert functions(Changing()) == ["relu"]
    monkeypatch.setattr(Changing, "forward", lambda self, x: F.mish(x))
    assert functions(Changing()) == ["mish"]


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_makers_of_libraries_are_run(library):
    transformers = pytest.importorskip("transformers.activations") if library == "transformers" else None

    class OfTorch(nn.Module):
        def forward(self, x):
            return nn.GELU()(x)

    class OfTransformers(nn.Module):
        def forward(self, x):
            return transformers.ACT2FN["silu"](x) + transformers.get_activation("gelu")(x)

    sites = find_sites(OfTorch() if library == "torch" else OfTransformers())
    assert {site.function for site in sites} == ({"gelu"} if library == "torch" else {"silu", "gelu"})
    assert not any(site.reason for site in sites)
