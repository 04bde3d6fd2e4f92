"""Unlisted classes and functions are recognised as activations by what they compute."""

import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx.passes.vocabulary.recognise import computes_unknown_function, recognise
from ortho_fx.passes.vocabulary.targets import TARGETS, Reference


def without_address(value):
    """The test's name without addresses, so that it is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


class NewGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class ByFunction(nn.Module):
    def __init__(self, exact):
        super().__init__()
        self.act = F.gelu if exact else functools.partial(F.gelu, approximate="tanh")

    def forward(self, x):
        return self.act(x)


class InPlaceSwish(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(x.sigmoid()) if self.inplace else x.mul(x.sigmoid())


class ForImages(nn.Module):
    def forward(self, x):
        batch, channels, height, width = x.shape
        return F.leaky_relu(x.reshape(batch, -1), 0.3).reshape(batch, channels, height, width)


class Dropping(nn.Module):
    def forward(self, x):
        return F.dropout(F.gelu(x), 0.5, self.training)


class Pooling(nn.Module):
    def forward(self, x):
        return F.relu(x - x.mean())


class Mixing(nn.Module):
    def forward(self, x):
        return F.relu(x.flatten().roll(1).reshape(x.shape))


class Noisy(nn.Module):
    def forward(self, x):
        return F.relu(x + torch.randn_like(x))


class WithWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)


class Scale(nn.Module):
    def forward(self, x):
        return 2 * x + 1


def gelu(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def swish(x, inplace: bool = False):
    """Has a docstring and a flag."""
    return x.mul_(x.sigmoid()) if inplace else x.mul(x.sigmoid())


def squared(x):
    y = F.relu(x)
    return y * y


def counting(x, seen=[]):  # noqa: B006
    seen.append(1)
    return F.relu(x)


class SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s + x * s * (1 - s))


class MemoryEfficientSwish(nn.Module):
    def forward(self, x):
        return SwishFunction.apply(x)


as_lambda = lambda x: x * torch.sigmoid(1.5 * x)  # noqa: E731


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        (NewGELU(), "gelu(approximate='tanh')"),
        (ByFunction(True), "gelu(approximate='none')"),
        (ByFunction(False), "gelu(approximate='tanh')"),
        (InPlaceSwish(), "silu"),
        (InPlaceSwish(inplace=True), "silu"),
        (ForImages(), "leaky_relu(negative_slope=0.3)"),
        (nn.ELU(0.7), "elu(alpha=0.7)"),
        (gelu, "gelu(approximate='none')"),
        (swish, "silu"),
        (squared, "relu_squared"),
        (functools.partial(F.leaky_relu, negative_slope=0.2), "leaky_relu(negative_slope=0.2)"),
        (torch.jit.script(gelu), "gelu(approximate='none')"),
        (SwishFunction.apply, "silu"),
        (MemoryEfficientSwish(), "silu"),
        (as_lambda, "swish(beta=1.5)"),
    ],
    ids=without_address,
)
def test_what_computes_an_activation_is_one(candidate, expected):
    reference = recognise(candidate)
    assert str(reference) == expected
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(reference(x), candidate(x.reshape(1, 1, 1, -1)).flatten(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "candidate",
    [
        *(Dropping(), Pooling(), Mixing(), Noisy(), WithWeight(), Scale(), nn.Identity(), nn.Linear(2, 2), nn.PReLU()),
        *(counting, math.sqrt, print, 3, functools.partial(F.dropout, p=0.5), len),
    ],
    ids=without_address,
)
def test_everything_else_is_not(candidate):
    assert recognise(candidate) is None


def test_functions_that_do_more_than_arithmetic_are_not_run():
    counting(torch.zeros(1))
    before = len(counting.__defaults__[0])
    recognise(counting)
    assert len(counting.__defaults__[0]) == before


def test_running_a_candidate_leaves_it_and_the_random_numbers_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return F.rrelu(x, training=True)

    module = Counting()
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    recognise(module)
    assert torch.equal(torch.randn(3), expected)
    assert module.calls == 0


def test_hooks_are_neither_copied_nor_run():
    class Owner:
        def __init__(self):
            self.calls = 0

        def __deepcopy__(self, memo):
            raise AssertionError

        def hook(self, *_):
            self.calls += 1

    module, owner = NewGELU(), Owner()
    module.register_forward_hook(owner.hook)
    assert recognise(module) is not None
    assert owner.calls == 0
    assert len(module._forward_hooks) == 1


def test_parameters_without_values_are_no_obstacle():
    with torch.device("meta"):
        assert computes_unknown_function(WithWeight()) is False


@pytest.mark.parametrize(
    "target", [t for t in TARGETS if t.name not in ("self_gated", "rrelu", "prelu", "celu")], ids=without_address
)
def test_every_function_of_the_table_is_told_from_the_others(target):
    settings = {"elu": {"alpha": 0.5}, "swish": {"beta": 1.3}, "leaky_relu": {"negative_slope": 0.1}}
    settings |= {"hardtanh": {"min_val": -2.0, "max_val": 3.0}}
    reference = Reference(target.name, tuple(settings.get(target.name, {}).items()))

    class Hidden(nn.Module):
        def forward(self, x):
            return reference(x)

    found = recognise(Hidden())
    assert found.target == target.name
    x = torch.linspace(-7, 7, 200, dtype=torch.float64)
    torch.testing.assert_close(found(x), reference(x))


@pytest.mark.parametrize(
    ("module", "unknown"), [(WithWeight(), True), (Scale(), False), (Pooling(), False), (nn.PReLU(), False)]
)
def test_elementwise_functions_of_no_table_are_noticed(module, unknown):
    assert computes_unknown_function(module) is unknown
