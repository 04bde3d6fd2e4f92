"""Activations in FX graphs: nodes and formulas, from symbolic tracing and from torch.export; replaced and put back."""

import math

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import fx, nn

from ortho_fx import ExpansionConfig, find_sites, revert_, rewrite_

CLOSE = ExpansionConfig("tropical_rational", 32, "fit")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        h = self.linear(x)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3))))
        h = h * torch.sigmoid(1.702 * h)
        h *= torch.sigmoid(h)
        h = F.gelu(h) + F.relu(self.linear(h)) ** 2
        h = h * F.tanh(F.softplus(h)) + F.leaky_relu(h, 0.2)
        return h * torch.sigmoid(x.mean(1, keepdim=True)) + x * torch.tanh(x)


FUNCTIONS = ["gelu", "swish", "silu", "gelu", "relu_squared", "mish", "leaky_relu", "sigmoid", "self_gated"]


def traced(kind, module, x):
    return fx.symbolic_trace(module) if kind == "traced" else torch.export.export(module, (x,)).module()


@pytest.mark.parametrize("kind", ["traced", "exported"])
def test_graphs_are_rewritten_and_put_back(kind):
    torch.manual_seed(0)
    module, x = Network().double(), torch.randn(400, 4, dtype=torch.float64)
    expected = module(x)
    graph = traced(kind, module, x)
    assert sorted(site.function for site in find_sites(graph)) == sorted(FUNCTIONS)
    report = rewrite_(graph, CLOSE, example_inputs=x)
    assert len(report.replaced) == 8
    assert not report.check(x).uncalled
    assert (graph(x) - expected).norm() < 0.01 * expected.norm()
    assert not torch.equal(graph(x), expected)
    assert str(rewrite_(graph)).endswith("; the model already held 8 expansions")
    assert len(revert_(graph).names) == 8
    assert torch.equal(graph(x), expected)
    assert sorted(site.function for site in find_sites(graph)) == sorted(FUNCTIONS)


def test_a_formula_becomes_one_call():
    class Small(nn.Module):
        def forward(self, x):
            y = x + 1
            z = y * torch.sigmoid(y) + F.hardtanh(y)
            return z * F.relu6(z + 3) / 6

    graph = fx.symbolic_trace(Small())
    rewrite_(graph)
    assert_expected_inline(
        graph.code.strip(),
        """\
def forward(self, x):
    add = x + 1;  x = None
    mul_expansion = self.mul_expansion(add)
    hardtanh = torch.nn.functional.hardtanh(add, min_val = -1.0, max_val = 1.0, inplace = False);  add = None
    add_1 = mul_expansion + hardtanh;  mul_expansion = hardtanh = None
    truediv_expansion = self.truediv_expansion(add_1);  add_1 = None
    return truediv_expansion""",
    )


def test_in_place_nodes_leave_their_result_in_the_input():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x * 1
            y.mul_(torch.sigmoid(y))
            return y + x

    x = torch.randn(300, 2, dtype=torch.float64)
    for kind in ("traced", "exported"):
        graph = traced(kind, InPlace(), x)
        (site,) = rewrite_(graph, CLOSE, example_inputs=x).sites
        assert site.function == "silu"
        torch.testing.assert_close(graph(x), F.silu(x) + x, rtol=0.01, atol=0.01)


def test_settings_of_aten_operators_are_read():
    class Settings(nn.Module):
        def forward(self, x):
            return F.elu(x, 0.5) + F.gelu(x, approximate="tanh") + F.leaky_relu(x, 0.3) + F.hardswish(x) + F.silu(x)

    x = torch.randn(300, 2, dtype=torch.float64)
    graph = traced("exported", Settings(), x)
    report = rewrite_(graph, CLOSE, example_inputs=x)
    assert len(report.replaced) == 5
    torch.testing.assert_close(graph(x), Settings()(x), rtol=0.01, atol=0.01)
