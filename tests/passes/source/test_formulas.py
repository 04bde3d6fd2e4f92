"""Formulas in a forward are recognised as activations, however they are written."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ortho_fx import ExpansionConfig, find_sites, rewrite_
from ortho_fx.passes.source.classes import find_calls, source_of
from ortho_fx.passes.source.methods import Method

MAP = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}
SHARED = nn.GELU()
CLOSE = ExpansionConfig("tropical_rational", 32, "fit")


def make_act(name):
    return MAP[name]()


def helper(x, activation, *, bias=None):
    x = MAP[activation]()(x)
    return x if bias is None else x + deeper(bias)


def deeper(x):
    return F.softplus(x) + F.gelu(x)


class Formulas(nn.Module):
    def __init__(self, alpha=1.702, kind="silu"):
        super().__init__()
        self.linear, self.alpha, self.kind = nn.Linear(4, 4), alpha, kind

    def forward(self, x):
        h = self.linear(x)
        a = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3))))
        b = a * 0.5 * (1.0 + torch.erf(a / math.sqrt(2.0)))
        c = b * torch.sigmoid(self.alpha * b)
        c *= torch.sigmoid(c)
        d = F.relu(self.linear(c)) ** 2
        e = torch.square(F.relu(d))
        f = e * F.relu6(e + 3) / 6
        g = f * torch.tanh(F.softplus(f))
        h = g / (1 + torch.exp(-g))
        i = h.mul(h.sigmoid())
        return i.mul_(i.sigmoid()) + x


EXPECTED = [
    ("gelu", "gelu(approximate='tanh')"),
    ("gelu", "gelu(approximate='none')"),
    ("swish", "swish(beta=1.702)"),
    ("silu", "silu"),
    ("relu_squared", "relu_squared"),
    ("relu_squared", "relu_squared"),
    ("hardswish", "hardswish"),
    ("mish", "mish"),
    ("silu", "silu"),
    ("silu", "silu"),
    ("silu", "silu"),
]


def test_formulas_are_found_and_told_apart():
    calls = find_calls(source_of(Formulas()))
    assert [(call.function, str(call.reference)) for call in calls] == EXPECTED
    assert {call.kind for call in calls} == {"formula"}


def test_a_rewritten_formula_computes_what_it_did():
    torch.manual_seed(0)
    module, x = Formulas().double(), torch.randn(500, 4, dtype=torch.float64)
    expected = module(x)
    report = rewrite_(module, CLOSE, example_inputs=x)
    assert len(report.replaced) == len(EXPECTED)
    assert (module(x) - expected).norm() < 0.01 * expected.norm()


def test_attributes_of_the_instance_decide_and_share_a_class_where_they_agree():
    first, second, other = Formulas(), Formulas(), Formulas(alpha=2.5)
    for module in (first, second, other):
        rewrite_(module)
    assert type(first) is type(second) is not type(other)
    assert str(find_calls(source_of(other))[2].reference) == "swish(beta=2.5)"


class Others(nn.Module):
    def __init__(self, kind="silu"):
        super().__init__()
        self.kind, self.gate, self.slope = kind, nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        act = nn.ReLU()
        x = act(x) + MAP[self.kind]()(x) + make_act("gelu")(x) + SHARED(x)
        x = helper(x, self.kind, bias=x) * torch.sigmoid(self.gate(x))
        x = x * torch.sigmoid(self.slope * x) + 4 * torch.tanh(x / 4) * torch.sigmoid(x)
        return x + torch.tanh(x / 30) * 30


def test_what_stands_in_the_place_of_a_function_is_resolved():
    sites = [(site.function, site.kind, bool(site.reason)) for site in find_sites(Others())]
    assert sites == [
        ("relu", "function", False),
        ("silu", "built in forward", False),
        ("gelu", "built in forward", False),
        ("gelu", "function", False),
        ("sigmoid", "function", True),
        ("sigmoid", "function", True),
        ("self_gated", "formula", False),
        ("tanh", "function", True),
        ("silu", "built in forward", False),
        ("softplus", "function", True),
        ("gelu", "function", False),
    ]


@pytest.mark.parametrize("compiled", [False, True])
def test_helpers_become_methods_and_compute_what_they_did(compiled):
    torch.manual_seed(0)
    module, x = Others().double(), torch.randn(500, 4, dtype=torch.float64)
    expected = module(x)
    assert len(rewrite_(module, CLOSE, example_inputs=x).replaced) == 7
    run = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    assert (run(x) - expected).norm() < 0.01 * expected.norm()
    assert helper(x, "silu") is not None  # the function itself has not changed
    assert torch.equal(helper(x, "silu"), F.silu(x))
    assert type(SHARED) is nn.GELU


def test_an_activation_that_is_chosen_at_run_time_is_reported():
    class Chosen(nn.Module):
        def forward(self, x, name="gelu"):
            return MAP[name]()(x) + MAP[name](x)

    reasons = {site.reason for site in find_sites(Chosen())}
    assert reasons == {"which activation it calls is known only when it runs"}


class Settings(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope, self.config = slope, {"alpha": 0.5}

    def forward(self, x):
        return F.leaky_relu(x, self.slope) + F.elu(x, alpha=0.25) + F.elu(x, self.config["alpha"])


def test_settings_are_read_from_the_instance_where_they_are_plain():
    for slope in (0.1, 0.3):
        references = [call.reference for call in find_calls(source_of(Settings(slope)))]
        assert [str(reference) for reference in references] == [
            f"leaky_relu(negative_slope={slope})",
            "elu(alpha=0.25)",
            "None",
        ]


class HeldByTheClass(nn.Module):
    act, partial = nn.GELU(), functools.partial(F.leaky_relu, negative_slope=0.2)
    static = staticmethod(torch.relu)

    def __init__(self):
        super().__init__()
        self.name = "mish"

    def forward(self, x):
        named = [F.elu(y) for y in (x, x)]
        inner = lambda y: F.selu(y)  # noqa: E731
        x = self.act(x) + self.partial(x) + self.static(x) + getattr(F, self.name)(x)
        return inner(x) + named[0] + named[1]


def test_what_the_class_holds_and_inner_functions_are_found():
    module, x = HeldByTheClass().double(), torch.randn(500, 4, dtype=torch.float64)
    expected = module(x)
    report = rewrite_(module, CLOSE, example_inputs=x)
    functions = {"elu", "selu", "gelu", "leaky_relu", "relu", "mish"}
    assert {site.function for site in report.replaced} == functions
    assert not report.left
    assert (module(x) - expected).norm() < 0.01 * expected.norm()
    assert type(HeldByTheClass.act) is nn.GELU


def test_functions_that_are_handed_on_or_named_at_run_time_are_reported():
    class Handing(nn.Module):
        def forward(self, x, name="relu"):
            act = F.gelu
            return checkpoint(F.silu, x, use_reentrant=False) + getattr(F, name)(x) + act(x)

    sites = {(site.function, site.reason) for site in find_sites(Handing())}
    assert sites == {
        ("silu", "it is handed on as a function, and where that is called is not known"),
        ("activation", "which activation it calls is known only when it runs"),
        ("gelu", ""),
    }


def test_a_forward_of_the_instance_is_reported():
    class Plain(nn.Module):
        def forward(self, x):
            return F.gelu(x)

    module = nn.Sequential(nn.Linear(2, 2), Plain())
    holder = nn.Sequential(nn.Linear(2, 2), Formulas())
    holder[1].forward = lambda x: x
    assert not any(site.reason for site in find_sites(module))
    assert {s.reason for s in find_sites(holder)} == {"the instance has a forward of its own, which is not the class'"}


@pytest.mark.parametrize(
    "expression",
    [
        "x * torch.sigmoid(y)",
        "x + y * torch.tanh(x)",
        "2 * x + 1",
        "torch.softmax(x, -1)",
        "x.clamp(min=0)",
        "x * x.mean()",
    ],
)
def test_what_is_no_formula(expression):
    import ast

    from ortho_fx.passes.source.formulas import formula_of

    def forward(self, x, y):
        return x + y

    method = Method("forward", forward, {}, cls=nn.Module)
    formula = formula_of(ast.parse(expression, mode="eval").body, method)
    assert formula is None or formula.reference() is None
