"""Gradients where Inductor sums over rows and over columns in one kernel.

On a GPU Inductor fuses such a "mix-order" pair if both read the same tensor, as in a LayerNorm's backward, or in an
expansion for each channel beside a sum over each row. The sums of an expansion share a buffer, and before PyTorch 2.15
such sums were lost. ortho_fx turns the fusion off on these releases. `tests.interpreter` runs the GPU's code.
"""

import copy

import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, torch_private
from ortho_fx.activations.expansion import make_activation
from tests.h100 import triton_code
from tests.interpreter import run
from tests.kinds import COMPILED, config_of

pytestmark = pytest.mark.slow

ROWS, CHANNELS = 48, 64
# Settings with which Inductor fuses a pair of any size, whatever it reads.
WANTED = {
    "triton.mix_order_reduction": True,
    "triton.mix_order_reduction_non_strict_mode": True,
    "triton.mix_order_reduction_max_reads": 0,
    "triton.nested_reduction": True,
}


def settings():
    """The wanted settings, as far as this release has them."""
    known = torch_private.load(torch_private.INDUCTOR).config.get_config_copy()
    return {name: value for name, value in WANTED.items() if name in known}


class Norms(nn.Module):
    """The same expansion after each of two layer norms."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.first, self.second = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)

    def forward(self, x):
        return self.activation(self.second(self.activation(self.first(x))))


class Scaled(nn.Module):
    """An expansion with a scale for each row; the scale's gradient sums over columns, the coefficients' over rows."""

    def __init__(self, activation, rows=ROWS):
        super().__init__()
        self.activation, self.scale = activation, nn.Parameter(torch.linspace(0.5, 2, rows).unsqueeze(1))

    def forward(self, x):
        return self.activation(x) * self.scale


MODELS = {"norms": Norms, "scaled": Scaled}
# Every pair of a model and a granularity with one kind, and every kind where it is mixed in both.
PAIRS = [("hermite", model, granularity) for model in MODELS for granularity in ("layer", "channel")]
OTHERS = [(kind, "norms", "channel") for kind in COMPILED if kind != "hermite"]


def build(model, kind, granularity):
    channels = CHANNELS if granularity == "channel" else None
    activation = make_activation(config_of(kind, 3, granularity=granularity), channels=channels, channel_dim=-1)
    built, generator = MODELS[model](activation), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return built


def tensors():
    generator = torch.Generator().manual_seed(0)
    x, tangent = torch.randn(2, ROWS, CHANNELS, generator=generator)
    return x.requires_grad_(), tangent


def exact(model, x, tangent):
    """The output and the gradients of x and of every parameter, in float64."""
    model, x = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    y = model(x)
    return y, torch.autograd.grad(y, [x, *model.parameters()], tangent.double())


def assert_near(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max().clamp(min=1)


def is_mixed(graph):
    return any("MixOrderReductionGrid" in kernel.definition for kernel in graph.kernels)


@pytest.mark.parametrize(("kind", "model", "granularity"), [*PAIRS, *OTHERS])
def test_gradients_on_a_gpu(kind, model, granularity):
    model, (x, tangent) = build(model, kind, granularity), tensors()
    code = triton_code(model, x, options=settings())
    (y,), gradients = run(code, [x, *model.parameters(), *model.buffers()], [tangent])
    expected, expected_gradients = exact(model, x, tangent)
    assert_near([y, *gradients[: len(expected_gradients)]], [expected, *expected_gradients])
    # An expansion for the whole layer has split sums, which Inductor does not mix.
    mixes = isinstance(model, Norms) or granularity == "channel"
    assert is_mixed(code.backward) == (mixes and torch_private.release() >= (2, 15)), str(code)


def test_a_layer_norm_alone_is_mixed_and_right():
    """Mixed kernels exist on every release, and the interpreter runs them."""
    model, (x, tangent) = nn.Sequential(nn.LayerNorm(CHANNELS), nn.GELU()), tensors()
    code = triton_code(model, x, options=settings())
    assert is_mixed(code.backward)
    (y,), gradients = run(code, [x, *model.parameters()], [tangent])
    expected, expected_gradients = exact(model, x, tangent)
    assert_near([y, *gradients], [expected, *expected_gradients])


def test_the_size_of_a_model_is_what_decides_by_default():
    x = torch.empty(16384, 512, device="meta", requires_grad=True)
    assert is_mixed(triton_code(nn.LayerNorm(512), x).backward)
    activation = make_activation(ExpansionConfig("hermite", 3, granularity="channel"), channels=512, channel_dim=-1)
    code = triton_code(Scaled(activation, 16384), x)
    assert is_mixed(code.backward) == (torch_private.release() >= (2, 15)), str(code)


@pytest.mark.parametrize(("kind", "model", "granularity"), [*PAIRS, OTHERS[-1]])
def test_gradients_on_a_cpu(kind, model, granularity):
    torch.compiler.reset()
    model, (x, tangent) = build(model, kind, granularity), tensors()
    y = torch.compile(model, fullgraph=True, options=settings())(x)
    gradients = torch.autograd.grad(y, [x, *model.parameters()], tangent)
    expected, expected_gradients = exact(model, x, tangent)
    assert_near([y, *gradients], [expected, *expected_gradients])
