"""Modules whose classes or attributes refuse: handled without asking them, or left with the reason."""

import abc
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import find_sites, revert_, rewrite_

KNOWN = []


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return F.gelu(self.linear(x))


class Strict(Base):
    def __init_subclass__(cls, **settings):
        raise TypeError("final")


class Registered(Base):
    def __init_subclass__(cls, **settings):
        super().__init_subclass__(**settings)
        KNOWN.append(cls)


class Child(Registered):
    def forward(self, x):
        return super().forward(x) + F.gelu(x)


class Abstract(Base, abc.ABC):
    pass


class Locked(Base):
    def __init__(self):
        super().__init__()
        self.kept = F.silu
        vars(self)["locked"] = True

    def forward(self, x):
        return self.kept(F.gelu(x))

    def __setattr__(self, name, value):
        if vars(self).get("locked"):
            raise AttributeError("locked")
        super().__setattr__(name, value)

    def __delattr__(self, name):
        raise AttributeError("locked")

    def add_module(self, name, module):
        raise AttributeError("locked")


class Delegating(Base):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            raise KeyError(name) from None


@pytest.mark.parametrize("cls", [Strict, Child, Abstract, Locked, Delegating])
def test_it_is_rewritten_and_put_back_without_asking(cls):
    module, x = cls(), torch.randn(3, 4)
    expected, known = module(x), list(KNOWN)
    assert rewrite_(module).replaced
    assert type(module) is not cls
    assert isinstance(module, cls)
    y = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
    revert_(module)
    assert type(module) is cls
    assert torch.equal(module(x), expected)
    assert known == KNOWN


def test_a_subclass_of_an_abstract_class_is_one_of_its_own():
    module, other = Abstract(), Abstract()
    rewrite_(module)
    assert isinstance(other, Abstract)
    assert not isinstance(other, type(module))
    assert isinstance(module, type(module))


class Meta(type):
    def __new__(meta, name, bases, members):
        KNOWN.append(name)
        return super().__new__(meta, name, bases, members)


class WithMeta(Base, metaclass=Meta):
    pass


def test_a_metaclass_of_somebodys_is_a_reason():
    known = list(KNOWN)
    (site,) = find_sites(nn.Sequential(WithMeta()))
    assert site.reason == "WithMeta has a metaclass of its own, Meta"
    assert known == KNOWN


def test_names_with_dots_are_a_reason():
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.GELU()))
    module._modules["a.b"] = nn.Sequential(nn.GELU(), Base())
    module._modules["1"]._modules["c.d"] = nn.GELU()
    report = rewrite_(module)
    assert [site.name for site in report.replaced] == ["1.0"]
    reason = "a name on the way to it is empty or has a dot, by which nothing finds it"
    assert {site.name: site.reason for site in report.left} == dict.fromkeys(
        ("1.c.d", "a.b.0", "a.b.1.gelu_expansion_0"), reason
    )
