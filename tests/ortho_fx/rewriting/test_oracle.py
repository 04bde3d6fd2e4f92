"""What a check sees run, whatever the report says: each activation is in the report, or it is named."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, Site, rewrite_
from ortho_fx.rewriting.oracle import Place, Ran
from ortho_fx.rewriting.rewrite import RewriteReport


class Every(nn.Module):
    """Activations called in every way that the oracle sees."""

    def __init__(self):
        super().__init__()
        self.act, self.kept, self.prelu = nn.GELU(), F.silu, nn.PReLU()

    def forward(self, x):
        x = self.kept(self.act(x))
        x = F.relu(x)
        x = x.relu()
        x = torch.celu(x)
        x = F.leaky_relu(
            x,
            0.1,
        )
        return torch.sigmoid(self.prelu(x))


def ran(model, x):
    seen = Ran(model)
    with torch.no_grad(), seen:
        model(x)
    return list(seen.places)


def test_every_way_to_call_one_is_seen_but_gates():
    places = ran(nn.Sequential(Every()), torch.randn(2, 4))
    assert [(place.function, place.module) for place in places] == [
        ("gelu", "0.act"),
        ("silu", "0"),
        *(("relu", "0"), ("relu", "0"), ("celu", "0"), ("leaky_relu", "0")),
    ]
    assert str(places[1]).startswith("silu in 0 at test_oracle.py:")


def test_activations_of_whole_numbers_are_none():
    seen = Ran(nn.Identity())
    with seen:
        F.relu(torch.arange(3))
    assert list(seen.places) == []


def test_after_the_rewrite_none_of_them_runs():
    model = nn.Sequential(Every())
    report = rewrite_(model)
    assert ran(model, torch.randn(2, 4)) == []
    assert report.check(torch.randn(2, 4)).passed


def test_what_is_left_is_in_the_report_and_what_is_not_is_named():
    model = nn.Sequential(Every())
    report = rewrite_(model, {"0.act": ExpansionConfig(), "0.relu_expansion_0": ExpansionConfig()})
    x = torch.randn(2, 4)
    assert {place.function for place in ran(model, x)} == {"silu", "relu", "celu", "leaky_relu"}
    assert report.check(x).unlisted == ()
    silent = RewriteReport(report.replaced, model=model)
    unlisted = silent.check(x).unlisted
    assert [line.split(" at ")[0] for line in unlisted] == ["silu in 0", "relu in 0", "celu in 0", "leaky_relu in 0"]
    assert not silent.check(x).passed
    assert "silu in 0 at test_oracle.py:" in str(silent.check(x))


@pytest.mark.parametrize("basis", ["hermite", "fourier", "tropical", "tropical_rational"])
def test_the_formula_of_an_expansion_is_not_taken_for_an_activation(basis):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert rewrite_(model, ExpansionConfig(basis)).check(torch.randn(2, 4)).unlisted == ()


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.lock, self.norm, self.act = threading.Lock(), nn.BatchNorm1d(4), nn.GELU()

    def forward(self, x):
        return self.act(self.norm(x))


def test_a_model_that_cannot_be_copied_is_checked_itself_and_left_as_it_was():
    model = Uncopyable().train()
    model.norm.eval()
    report, before = rewrite_(model), {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    check = report.check(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert (check.passed, check.copied) == (True, False)
    assert "the model cannot be copied, so changed inputs were not looked for" in str(check)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.norm.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("first", [1, 3])
def test_a_line_is_listed_where_the_call_spans_it(first):
    place = Place("relu", "0", (("m.py", 2, 4),))
    site = Site("0.relu_expansion_0", "function", "relu", location=f"m.py:{first}", reason="it is left")
    assert place.is_listed([site]) is (first == 3)
