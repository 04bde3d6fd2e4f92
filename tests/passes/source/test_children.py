"""A module whose code goes through its children, or asks what they are, is not given another child or another class."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import find_sites, rewrite_


def linears():
    return [nn.Linear(4, 4), nn.Linear(4, 4)]


class Stack(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = F.gelu(layer(x))
        return x


class Layers(nn.ModuleList):
    def forward(self, x):
        for layer in self[:-1]:
            x = F.gelu(layer(x))
        return self[-1](x)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = linears()

    def forward(self, x):
        for _, layer in self.named_children():
            x = F.gelu(layer(x))
        return x


CONTAINER = "is a container, in which the expansion would be one more layer"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Stack(*linears()), f"Stack {CONTAINER}"),
        (lambda: Layers(linears()), f"Layers {CONTAINER}"),
        (Named, "the code goes through self.named_children, where the expansion would be one more child"),
    ],
)
def test_it_is_left_where_the_expansion_would_be_run_as_a_layer(make, reason):
    model = nn.Sequential(make(), nn.ReLU())
    report = rewrite_(model)
    assert [(site.name, site.reason) for site in report.left] == [("0.gelu_expansion_0", reason)]
    assert [site.name for site in report.replaced] == ["1"]


class Features(nn.Module):
    """Collects what comes out of every ReLU, as perceptual losses do."""

    def __init__(self, test):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU())
        self.test = test

    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU | nn.Linear):
                found.append(x)
        return found


class OfType(Features):
    def forward(self, x):
        return [x := layer(x) for layer in self.layers if type(layer) is nn.ReLU]


@pytest.mark.parametrize("cls", [Features, OfType])
def test_an_activation_whose_class_the_code_tests_stays(cls):
    model = nn.ModuleDict({"vgg": cls(nn.ReLU), "other": nn.Sequential(nn.ReLU())})
    sites = {site.name: site.reason for site in find_sites(model)}
    assert sites == {
        "vgg.layers.1": f"the code of {cls.__name__} tests whether it is a ReLU",
        "vgg.layers.3": "",
        "other.0": "",
    }


class Discards(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.other = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x):
        y = x * 2
        self.act(y)
        return self.other(y)


def test_a_module_that_is_called_for_its_change_in_place_stays():
    model, x = Discards(), torch.randn(3, 4)
    expected = model(x)
    report = rewrite_(model)
    assert [(site.name, site.reason) for site in report.left] == [
        ("act", "it is called to change its input, and nothing takes its result")
    ]
    assert [site.name for site in report.replaced] == ["other"]
    assert model(x).shape == expected.shape


class Rereads(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.linear = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x):
        x = self.linear(x)
        kept = x
        x = self.act(x)
        return x + kept


class UnderItsName(Rereads):
    def forward(self, x):
        x = self.linear(x)
        y = self.act(x)
        return y + x


class Residual(Rereads):
    def forward(self, x):
        kept = x
        x = self.linear(x)
        x = self.act(x)
        return x * kept


class Later(Rereads):
    def forward(self, x):
        x = self.act(self.linear(x) + x)
        x = self.act(x)
        later = x
        return x + later


@pytest.mark.parametrize(("cls", "left"), [(Rereads, True), (UnderItsName, True), (Residual, False), (Later, False)])
def test_a_module_whose_changed_input_is_read_again_stays(cls, left):
    (site,) = find_sites(cls())
    assert site.reason == ("it changes its input in place, and that is read again" if left else "")
