"""An optimizer that was made before the rewrite is a warning at its first step, and no other one is."""

import gc
import sys
import warnings

import pytest
import torch
from torch import nn

from ortho_fx import rewrite_
from ortho_fx.rewriting import late


@pytest.fixture(autouse=True)
def nothing_pending():
    late._pending.clear()
    yield
    assert not late._pending
    assert not late._hooks


def made():
    return nn.Sequential(nn.Linear(2, 2), nn.GELU())


def step(optimizer, model):
    model(torch.ones(1, 2)).sum().backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(one.message) for one in told]


def test_one_made_before_is_told_at_its_first_step():
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewrite_(model, "hermite3")
    (told,) = step(optimizer, model)
    assert told.startswith("ortho_fx: the optimizer SGD trains the Sequential but not its expansions, and no other")
    assert step(optimizer, model) == []


def test_one_made_afterwards_is_not():
    model = made()
    rewrite_(model, "hermite3")
    assert step(torch.optim.SGD(model.parameters(), lr=0.1), model) == []


def test_two_optimizers_may_share_the_model():
    model = made()
    rewrite_(model, "hermite3")
    weights, expansions = (torch.optim.SGD(module.parameters(), lr=0.1) for module in model)
    assert step(weights, model) == step(expansions, model) == []


def test_frozen_expansions_need_none():
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewrite_(model, "hermite3")
    model[1].requires_grad_(False)
    assert step(optimizer, model) == []


def test_other_models_and_those_that_are_gone_do_not_matter():
    model, other, gone = made(), made(), made()
    rewrite_(model, "hermite3")
    rewrite_(gone, "hermite3")
    del gone
    gc.collect()
    assert step(torch.optim.SGD(other.parameters(), lr=0.1), other) == []
    assert len(late._pending) == 1
    assert step(torch.optim.SGD(model.parameters(), lr=0.1), model) == []


class Adapter(nn.Module):
    """What a library of adapters puts into a model, by the name of its package."""

    __module__ = "peft.tuners"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return x + self.weight


def test_adapters_that_freeze_expansions_are_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "ortho_fx.integrations.peft", raising=False)
    model = made()
    rewrite_(model, "hermite3")
    model.requires_grad_(False)
    model.append(Adapter())
    (told,) = step(torch.optim.SGD(model[2].parameters(), lr=0.1), model)
    assert told == (
        "ortho_fx: adapters of peft have frozen the expansions of the model, and their files will not have them: call "
        "ortho_fx.integrations.peft.enable() before the adapters are made"
    )
