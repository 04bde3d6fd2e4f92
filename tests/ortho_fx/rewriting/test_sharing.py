"""Sharing of expansions: one for each instance, wherever it is called, or one for each place and each call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionActivation, ExpansionConfig, OrthoFxError, find_sites, revert_, rewrite_

FIT = ExpansionConfig("tropical_rational", 8, "fit")


class Block(nn.Module):
    """A block as in a ResNet: it calls one in-place activation twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.first(x))
        out = self.second(out)
        out = out + x
        return self.relu(out)


def expansions(model):
    return [name for name, module in model.named_modules() if isinstance(module, ExpansionActivation)]


def test_a_module_that_is_called_twice_is_one_expansion_or_two():
    torch.manual_seed(0)
    x = torch.randn(300, 4)
    for sharing, names in (("instance", ["relu"]), ("site", ["relu_expansion_0", "relu_expansion_1"])):
        block = Block()
        expected = block(x)
        assert [site.name for site in find_sites(block, sharing=sharing)] == names
        report = rewrite_(block, FIT, sharing=sharing)
        assert expansions(block) == names
        torch.testing.assert_close(block(x), expected)
        assert report.check(x).passed
        block(x).sum().backward()
        assert all(p.grad is not None for p in block.parameters())
        assert str(rewrite_(block, FIT, sharing=sharing)).endswith(f"already held {len(names)} expansions")
        revert_(block)
        assert torch.equal(block(x), expected)


def test_an_instance_in_several_places_is_one_expansion_or_several():
    act = nn.GELU()
    for sharing, count in (("instance", 1), ("site", 3)):
        model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.ModuleDict({"last": act}))
        rewrite_(model, sharing=sharing)
        assert len({id(m) for m in model.modules() if isinstance(m, ExpansionActivation)}) == count
        assert type(act) is nn.GELU


def test_an_activation_of_the_whole_process_is_never_changed():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), PROCESS_WIDE

        def forward(self, x):
            return self.act(self.linear(x)) + PROCESS_WIDE(x)

    model, other = Head(), Head()
    rewrite_(model)
    assert expansions(model) == ["gelu_expansion_0", "act"] or expansions(model) == ["act", "gelu_expansion_0"]
    assert type(other.act) is type(PROCESS_WIDE) is Library
    x = torch.randn(3)
    assert torch.equal(PROCESS_WIDE(x), F.gelu(x))


class Library(nn.Module):
    """A leaf module that keeps a function, like GELUActivation of transformers."""

    def __init__(self):
        super().__init__()
        self.act = F.gelu

    def forward(self, x):
        return self.act(x)


PROCESS_WIDE = Library()


def test_patterns_that_disagree_on_a_shared_activation_are_an_error():
    act = nn.GELU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    config = {"1": ExpansionConfig("fourier"), "3": ExpansionConfig("hermite")}
    with pytest.raises(OrthoFxError) as caught:
        rewrite_(model, config)
    told = "patterns disagree on one shared activation: 1 by '1', 3 by '3'; share by site, or let them agree"
    assert str(caught.value) == told
    assert model[1] is act
    report = rewrite_(model, config, sharing="site")
    assert [site.expansion for site in report.replaced] == ["fourier 5", "hermite 3"]


def test_a_pattern_may_name_any_place_of_a_shared_activation():
    act = nn.GELU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    assert rewrite_(model, {"3": ExpansionConfig("fourier")}).replaced[0].expansion == "fourier 5"


def test_an_unknown_sharing_is_named():
    with pytest.raises(OrthoFxError, match=r"^sharing must be instance, call or site; got 'expert'$"):
        rewrite_(Block(), sharing="expert")
