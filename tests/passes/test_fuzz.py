"""Small modules made at random: rewritten with expansions that equal what they replace, they compute what they did, and
every activation that still runs is in the report."""

import copy
import importlib.util
import itertools
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ortho_fx import ExpansionActivation, HermiteActivation, revert_
from ortho_fx.passes.pipeline import run
from ortho_fx.passes.vocabulary.expansions import Maker
from ortho_fx.rewriting.oracle import Ran

HEAD = """
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def helper(h):
    return F.gelu(h)


def twice(h, function):
    return function(function(h))


def plain(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.SiLU()

    def forward(self, h):
        return self.act(self.linear(h))


class Base(nn.Module):
    default = staticmethod(F.relu)
    activation = None

    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act, self.in_place, self.kept = nn.GELU(), nn.ReLU(inplace=True), F.elu
        self.activation = F.selu
        self.block, self.blocks = Block(), nn.ModuleList([Block(), nn.ReLU()])
        self.shared = nn.Sequential(self.act, nn.Linear(4, 4), self.act)
        self.table, self.kind, self.name = {"relu": F.relu, "silu": F.silu}, "relu", "gelu"

    def parent(self, h):
        return F.celu(h)
"""

# Statements over x, of shape (batch, 4), and y, of the same shape or a view of x.
STATEMENTS = (
    "x = {self}.linear(x)",
    "x = {self}.other(x)",
    *(f"x = F.{name}(x)" for name in ("relu", "gelu", "silu", "elu", "leaky_relu")),
    "x = F.leaky_relu(x, 0.2)",
    "x = F.gelu(x, approximate='tanh')",
    "x = torch.relu(x)",
    "x = x.relu()",
    "x = x * torch.sigmoid(x)",
    "x *= torch.sigmoid(1.702 * x)",
    "x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))",
    "x = F.relu(x) ** 2",
    "F.relu(x, inplace=True)",
    "F.relu_(x)",
    "x.relu_()",
    "F.elu(input=x, inplace=True)",
    "y = x",
    "y = x[:, :2]",
    "y = F.relu(y)",
    "y.relu_()",
    "x = x + y.sum()",
    "x = {self}.act(x)",
    "x = {self}.act(input=x)",
    "x = {self}.act.forward(x)",
    "x = {self}.in_place(x)",
    "{self}.in_place(x)",
    "x = {self}.kept(x)",
    "x = {self}.activation(x)",
    "x = {self}.default(x)",
    "x = {self}.block(x)",
    "x = {self}.shared(x)",
    "for layer in {self}.blocks: x = layer(x)",
    "x = {self}.table[{self}.kind](x)",
    "x = getattr(F, {self}.name)(x)",
    "x = getattr(F, 'silu')(x)",
    "x = helper(x)",
    "x = twice(x, F.gelu)",
    "x = twice(x, {self}.act)",
    "x = checkpoint(F.gelu, x, use_reentrant=False)",
    "x = functools.partial(F.leaky_relu, negative_slope=0.3)(x)",
    "x = {self}.parent(x)",
    "x = super({name}, {self}).parent(x)",
    "x = sum(F.silu(h) for h in (x, y[:, :1]))",
    "x = [F.relu(h, inplace=True) for h in (x + 0, x)][1]",
    "x = (lambda h: F.gelu(h) + x)(x)",
    "x = (lambda {self}: F.gelu({self}))(x)",
    "x = nn.Mish()(x)",
    "act = nn.ReLU(); x = act(x)",
    "if {self}.training: x = F.gelu(x)",
    "x = F.silu(x) if {self}.training else F.mish(x)",
    "for _ in range(2): x = F.gelu({self}.linear(x))",
    "x = torch.stack([F.relu(row) for row in x])",
    "x = x if x.isfinite().all() else F.relu(x)",
    "x = F.relu(x) + F.gelu(F.silu(x))",
    "import torch.nn.functional as functional; x = functional.gelu(x)",
)
INNER = (
    "def inner(h):\n    h = {statement}\n    return h\nx = inner(x)",
    "def inner({self}):\n    return F.gelu({self})\nx = inner(x)",
)


@st.composite
def modules(draw):
    """The source of a module `Net`."""
    owner = draw(st.sampled_from(["self", "s"]))
    lines = draw(st.lists(st.sampled_from([*STATEMENTS, INNER[1]]), min_size=1, max_size=6))
    body = "\n".join(["y = x", *lines, "return x"]).replace("{self}", owner).replace("{name}", "Net")
    decorator = draw(st.sampled_from(["", "", "", "@plain\n", "@wrapped\n", "@torch.no_grad()\n"]))
    how = draw(st.sampled_from(["forward", "forward", "forward", "method", "call", "stack"]))
    name = {"method": "compute", "stack": "compute"}.get(how, "forward")
    code = f"{decorator}def {name}({owner}, x):\n" + textwrap.indent(body, "    ")
    if how == "method":
        code += "\n\ndef forward(self, x):\n    return self.compute(x)"
    elif how == "stack":
        code += (
            "\n\ndef forward(self, x):\n    for child in [self.linear, self.block]:\n        x = child(x)\n"
            "    return self.compute(x)"
        )
    elif how == "call":
        code += "\n\ndef __call__(self, x):\n    return F.relu(super().__call__(x))"
    return HEAD + "\n\nclass Net(Base):\n" + textwrap.indent(code, "    ") + "\n"


class Exact(HermiteActivation):
    """Stands for an expansion, and computes what it replaces."""

    def forward(self, x=None, inplace=False, **named):
        (x,) = (x,) if x is not None else named.values()
        return self.reference(x)


def make(config, *, reference=None, channels=None, channel_dim=None, device=None, dtype=None):
    assert reference is not None
    return Exact(reference=reference)


_numbers = itertools.count()


def load(source, folder):
    """The class `Net` of a source; in a file, for Python to find its text."""
    path = Path(folder, f"fuzz_{next(_numbers)}.py")
    path.write_text(source)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.Net


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(source=modules())
def test_a_rewritten_module_computes_what_it_did_and_its_report_names_what_still_runs(folder, source):
    torch.manual_seed(0)
    model, x = load(source, folder)(), torch.randn(3, 4)
    try:
        expected = {training: copy.deepcopy(model).train(training)(x.clone()) for training in (True, False)}
    except (RuntimeError, TypeError, UnboundLocalError):  # in-place changes of views, or names that a scope hides
        return
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # Without `until` a model with nothing to replace is an error.
    possible = any(not site.reason for site in run(model, until="choose").sites)
    until = None if possible else "choose"
    sites = run(model, until=until, maker=Maker(make, None), disable=["lower"]).left
    for training, outputs in expected.items():
        seen = Ran(model.train(training))
        with torch.no_grad(), seen:
            actual = model(x.clone())
        torch.testing.assert_close(actual, outputs, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert [str(place) for place in seen.places if not place.is_listed(sites)] == []
    if any(isinstance(module, ExpansionActivation) for module in model.modules()):
        revert_(model)
        assert {name: value.tolist() for name, value in model.state_dict().items()} == {
            name: value.tolist() for name, value in before.items()
        }
        torch.testing.assert_close(model.train()(x.clone()), expected[True], rtol=1e-5, atol=1e-5, equal_nan=True)
