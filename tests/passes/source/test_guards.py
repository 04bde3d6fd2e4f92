"""A ReLU that keeps a number positive or makes a loss, and a rescaled activation, stay unless they are named."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from ortho_fx import find_sites, rewrite_
from ortho_fx.passes.vocabulary.guards import Use, guard_of


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale, self.p, self.eps = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), 1.5, 1e-6


class Root(Base):
    def forward(self, x):
        return torch.sqrt(F.relu(self.linear(x)))


class RootOfSum(Base):
    def forward(self, x):
        return self.linear(x).relu().sum(-1).sqrt()


class Logarithm(Base):
    def forward(self, x):
        y = F.relu(self.linear(x))
        return y.log()


class Constant(Base):
    def forward(self, x):
        return F.relu(self.linear(x)) + self.eps


class FeatureMap(Base):
    def forward(self, x):
        q, k = F.elu(self.linear(x)) + 1, x
        return q * k


class Divisor(Base):
    def forward(self, x):
        y = F.relu(self.linear(x))
        return x / y.sum(-1, keepdim=True)


class Power(Base):
    def forward(self, x):
        return F.relu(self.linear(x)) ** self.p


class PowerByMethod(Base):
    def forward(self, x):
        return F.relu(self.linear(x)).pow(0.5 if self.p else 1.5)


class Parameter(Base):
    def forward(self, x):
        return x * F.relu(self.scale)


class PartOfParameter(Base):
    def forward(self, x):
        scale = self.scale[None] * 2
        return x - torch.relu(scale)


class Running(Base):
    def forward(self, x):
        gate = F.relu(self.linear(x))
        return x - gate.tril(-1).cumsum(0)


class Child(Base):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return (self.act(self.linear(x)) + 1e-5).log()


class KeptFunction(Child):
    def __init__(self):
        super().__init__()
        del self.act
        self.act = F.relu


POSITIVE = {
    Root: "what is under a root",
    RootOfSum: "what is under a root",
    Logarithm: "what is under a logarithm",
    Constant: "what a positive constant is added to",
    FeatureMap: "what a positive constant is added to",
    Divisor: "a divisor",
    Power: "the base of a power",
    PowerByMethod: "the base of a power",
    Parameter: "a parameter",
    PartOfParameter: "a parameter",
    Running: "a cumulative sum",
    Child: "what a positive constant is added to",
    KeptFunction: "what a positive constant is added to",
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("cls", "what"), POSITIVE.items())
def test_what_keeps_a_number_positive_is_left_and_replaced_where_it_is_named(cls, what, traced):
    module = fx.symbolic_trace(cls()) if traced else cls()
    (site,) = find_sites(module)
    assert site.reason == f"it keeps {what} positive, and it stays unless it is named as a target"
    assert [one.reason for one in find_sites(module, targets=[site.function])] == [""]


class Hinge(Base):
    def forward(self, x):
        return F.relu(1 - self.linear(x)).mean()


class Triplet(Base):
    """The margin is an attribute, and the terms have names."""

    def forward(self, x):
        near, far = self.linear(x).norm(dim=-1), x.norm(dim=-1)
        behind = near - far + self.p
        loss = torch.relu(behind).square()
        return torch.sum(loss)


class HingeOfChild(Child):
    def forward(self, x):
        return self.act(self.p - self.linear(x)).sum(-1).mean()


class WeightedHinge(Base):
    def forward(self, x):
        losses = F.relu(1 - self.linear(x))
        return (x.softmax(-1) * losses / x.shape[0]).sum()


class Pooled(Base):
    """Each row has a mean of its own, so this is no loss."""

    def forward(self, x):
        return F.relu(1 - self.linear(x)).mean(-1)


class NoMargin(Base):
    def forward(self, x):
        return F.relu(self.linear(x)).mean()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("cls", [Hinge, Triplet, HingeOfChild, WeightedHinge])
def test_a_hinge_loss_is_left_and_replaced_where_it_is_named(cls, traced):
    module = fx.symbolic_trace(cls()) if traced else cls()
    (site,) = find_sites(module)
    assert site.reason == "it is a hinge loss, and it stays unless it is named as a target"
    assert [one.reason for one in find_sites(module, targets=[site.function])] == [""]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("cls", [Pooled, NoMargin])
def test_what_is_no_hinge_loss_is_replaced(cls, traced):
    module = fx.symbolic_trace(cls()) if traced else cls()
    assert [site.reason for site in find_sites(module)] == [""]


class HardSigmoid(Base):
    def forward(self, x):
        return x * F.relu6(self.linear(x) + 3.0) / 6.0


@pytest.mark.parametrize("traced", [False, True])
def test_a_hard_sigmoid_that_multiplies_something_else_is_left(traced):
    module = fx.symbolic_trace(HardSigmoid()) if traced else HardSigmoid()
    (site,) = find_sites(module)
    assert site.reason == "it is a hard sigmoid, and it stays unless it is named as a target"


class Ratio(Base):
    def forward(self, x):
        return F.silu(self.linear(x)) / 0.596


class Gain(Base):
    def forward(self, x):
        y = F.gelu(self.linear(x))
        y = 1.7 * y
        return y


class GainOfInstance(Base):
    def forward(self, x):
        return F.silu(self.linear(x)).mul_(self.p)


class GainInPlace(Base):
    def forward(self, x):
        y = F.gelu(self.linear(x))
        y *= 1.7
        return y


@pytest.mark.parametrize("cls", [Ratio, Gain, GainOfInstance, GainInPlace])
def test_what_a_constant_rescales_is_left(cls):
    (site,) = find_sites(cls())
    assert site.reason == "its result is rescaled by a constant, and it stays unless it is named as a target"
    assert len(rewrite_(cls(), targets=[site.function]).replaced) == 1


class Chained(Base):
    """Activations whose results go into other activations' formulas, residuals and gates."""

    def forward(self, x):
        a = F.gelu(self.linear(x))
        b = a * torch.sigmoid(1.702 * a)
        c = F.relu(b) ** 2
        d = F.relu(c)
        e = d * F.relu6(d + 3) / 6
        f = e + F.relu(e) * self.linear(e)
        return f / f.norm() + F.relu(f) - 1 + F.relu(f) ** 3


@pytest.mark.parametrize("traced", [False, True])
def test_ordinary_activations_are_no_guards(traced):
    module = fx.symbolic_trace(Chained()) if traced else Chained()
    sites = [site for site in find_sites(module) if site.function not in ("sigmoid", "relu6")]
    assert len(sites) >= 7
    assert {site.reason for site in sites} == {""}


def use(operation, operand=0, other=None, *further):
    return Use(operation, operand, other, lambda: further)


@pytest.mark.parametrize(
    ("uses", "guarded"),
    [
        ([], False),
        ([use("add", 0, -1.0)], False),
        ([use("add", 0, 1.0), use("relu")], False),
        ([use("truediv", 0)], False),
        ([use("truediv", 1)], True),
        ([use("pow", 0, 3.0)], False),
        ([use("pow", 1)], False),
        ([use("view", 0, None, use("log1p")), use("mul")], True),
        ([use("linear", 0, None, use("log1p"))], False),
    ],
)
def test_what_becomes_of_a_result_decides(uses, guarded):
    assert bool(guard_of("relu", uses)) is guarded
    assert guard_of("silu", uses) == ""
    assert guard_of("sigmoid", uses) == ""
