"""Nested tensors as inputs: every part is what the expansion gives for it alone, with its gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ortho_fx import ExpansionConfig, HermiteActivation, TropicalActivation, calibrate_, freeze_, rewrite_
from ortho_fx.errors import OperandError

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

LAYOUTS = (torch.jagged, torch.strided)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["jagged", "strided"])


def expansions():
    torch.manual_seed(0)
    channel = HermiteActivation(granularity="channel", channels=3, dtype=torch.float64)
    with torch.no_grad():
        channel.coefficients.add_(torch.randn(4, 3))
    frozen = nn.Sequential(copy.deepcopy(channel))
    freeze_(frozen)
    return (
        HermiteActivation(dtype=torch.float64),
        TropicalActivation(clamp=1.0, dtype=torch.float64),
        channel,
        frozen[0],
    )


def nested(layout, *lengths, width=3):
    torch.manual_seed(1)
    parts = [torch.randn(length, width, dtype=torch.float64) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)


@each_layout
def test_parts_and_their_gradients(layout):
    for expansion in expansions():
        x = nested(layout, 2, 5)
        y = expansion(x)
        assert y.layout == layout
        assert (x + y).is_nested  # of the same raggedness
        parts = [part.detach().requires_grad_() for part in x.unbind()]
        expected = [expansion(part) for part in parts]
        for part, value in zip(y.unbind(), expected, strict=True):
            assert_close(part, value)
        torch.cat(expected).sum().backward()
        gradients = [parameter.grad for parameter in expansion.parameters()]
        expansion.zero_grad()
        torch.cat(y.unbind()).sum().backward()
        for part, grad in zip(parts, x.grad.unbind(), strict=True):
            assert_close(part.grad, grad)
        assert_close([parameter.grad for parameter in expansion.parameters()], gradients)


def test_jagged_in_another_dimension_and_with_gaps():
    layer, _, channel, _ = expansions()
    x = nested(torch.jagged, 2, 5)
    turned = layer(x.transpose(1, 2))
    assert turned.shape == x.transpose(1, 2).shape
    for part, value in zip(turned.unbind(), layer(x).unbind(), strict=True):
        assert torch.equal(part, value.T)
    with pytest.raises(OperandError):
        channel(nested(torch.jagged, 3, 3, width=4))  # a ragged dimension holds no channels, whatever its lengths
    values = torch.randn(10, 3, dtype=torch.float64)
    gaps = torch.nested.nested_tensor_from_jagged(
        values, offsets=torch.tensor([0, 4, 10]), lengths=torch.tensor([2, 5])
    )
    for part, value in zip(layer(gaps).unbind(), gaps.unbind(), strict=True):
        assert torch.equal(part, layer(value))
    model = nn.Sequential(layer)
    assert calibrate_(model, [gaps]).sites[0].samples == 7 * 3


@each_layout
def test_wrong_channels_name_the_site(layout):
    channel = expansions()[2]
    channel.site = "mlp.act"
    with pytest.raises(OperandError, match=r"^mlp\.act: no regular dimension of its nested input has 3 channels$"):
        channel(nested(layout, 2, 5, width=4))


@each_layout
def test_nested_example_inputs(layout):
    for granularity in ("layer", "channel"):
        model = nn.Sequential(nn.Linear(3, 6), nn.GELU()).double()
        x = nested(layout, 2, 50)
        rewrite_(model, ExpansionConfig("hermite", 3, "calibrated", granularity), example_inputs=x)
        expected = nn.Sequential(copy.deepcopy(model[0]), nn.GELU()).double()
        rewrite_(expected, ExpansionConfig("hermite", 3, "calibrated"), example_inputs=torch.cat(x.unbind()))
        assert_close(torch.cat(model(x).unbind()), expected(torch.cat(x.unbind())))


@pytest.mark.slow
def test_compiled():
    for expansion in expansions():
        x = nested(torch.jagged, 2, 5)
        torch.compiler.reset()
        compiled = torch.compile(expansion, backend="aot_eager", fullgraph=True)
        assert_close(compiled(x).values(), expansion(x).values())
