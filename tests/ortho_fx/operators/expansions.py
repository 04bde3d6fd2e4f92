"""Shared by the tests of compiled operators: expansions, their inputs, exact results, and two ways to compile."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, torch_private
from ortho_fx.activations.expansion import channel_dim_of, make_activation
from ortho_fx.operators import operator
from tests.kinds import COMPILED_BASES

_compiler = torch_private.load(torch_private.TESTS)

every_basis = pytest.mark.parametrize("basis", COMPILED_BASES)
LAST = torch.channels_last


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expansion(basis, degree=3, granularity="layer", channels=None, seed=0, dtype=None):
    """An activation whose groups all have different expansions."""
    config = ExpansionConfig(basis, degree, granularity=granularity)
    activation = make_activation(config, channels=channels, dtype=dtype)
    with torch.no_grad():
        for number, parameter in enumerate(activation.parameters()):
            parameter.add_(0.1 * noise(*parameter.shape, seed=100 * seed + number, dtype=parameter.dtype))
    return activation


class Around(nn.Module):
    """An activation with other operations around it."""

    def __init__(self, activation, function):
        super().__init__()
        self.activation, self.function = activation, function

    def forward(self, *inputs):
        return self.function(self.activation, *inputs)


AROUND = {
    "alone": (lambda act, x: act(x), 1),
    "residual": (lambda act, x: act(x) + x, 1),
    "dropout": (lambda act, x: F.dropout(act(x), 0.1), 1),
    "gate": (lambda act, x, gate: act(x) * gate, 2),
    "all": (lambda act, x, gate: F.dropout(act(x) * gate, 0.1) + x, 2),
}


def tensors(activation, x):
    return [x, *(getattr(activation, parameter.name) for parameter in activation.basis.parameters)]


def exact(activation, x, seed):
    """The value of the eager operator and its gradients, all in float64."""
    arguments = [x.detach().double().requires_grad_()]
    arguments += [p.detach().double().requires_grad_(p.requires_grad) for p in tensors(activation, x)[1:]]
    y = operator(activation.basis)(*arguments, 1 if activation.channels is None else channel_dim_of(activation, x))
    y.backward(seed.double())
    return [y.detach(), *(t.grad for t in arguments if t.requires_grad)]


def outcome(activation, function, x, seed):
    """The value of the function and the gradients, in the same order."""
    x = x.detach().requires_grad_()
    activation.zero_grad()
    y = function(x)
    y.backward(seed)
    return [y.detach(), *(t.grad for t in tensors(activation, x) if t.requires_grad)]


def assert_near(actual, expected, tolerance, label=None):
    for number, (tensor, reference) in enumerate(zip(actual, expected, strict=True)):
        assert tensor.shape == reference.shape, (label, number)
        error = (tensor.double() - reference).norm()
        assert error <= tolerance * reference.norm(), (label, number, float(error), float(reference.norm()))


@contextlib.contextmanager
def without_caches():
    with torch.compiler.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        yield


class CountedInductor:
    """Inductor as a backend that counts the graphs which it compiles."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph_module, inputs):
        self.graphs += 1
        return _compiler.lookup_backend("inductor")(graph_module, inputs)
