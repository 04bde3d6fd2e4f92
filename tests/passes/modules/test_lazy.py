"""Lazy modules, whose parameters have no shape before the first call."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.testing import assert_close

from ortho_fx import ExpansionConfig, OrthoFxError, find_sites, revert_, rewrite_


class LazyScale(LazyModuleMixin, nn.Module):
    cls_to_become = None

    def __init__(self):
        super().__init__()
        self.weight = nn.UninitializedParameter(dtype=torch.float64)

    def initialize_parameters(self, x):
        if self.has_uninitialized_params():
            self.weight.materialize(x.shape[-1:])
            nn.init.ones_(self.weight)

    def forward(self, x):
        return x * self.weight


def lazy():
    layers = nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2), nn.GELU()
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_pytorchs_own(granularity):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = lazy()
    assert [site.reason for site in find_sites(model, x)] == ["", ""]
    config = ExpansionConfig("tropical_rational", 32, "fit", granularity)
    rewrite_(model, config, example_inputs=x)
    assert all(isinstance(parameter, nn.UninitializedParameter) for parameter in model[0].parameters())
    if granularity == "channel":
        assert (model[1].channel_dim, model[1].channels, model[4].channel_dim, model[4].channels) == (1, 4, -1, 2)
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(0)
    assert_close(twin(x), y)
    revert_(model)
    assert_close(model(x), y, rtol=2e-2, atol=2e-2)


def test_buffers_without_a_shape_cannot_be_copied():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    with pytest.raises(OrthoFxError, match=r"^Sequential cannot be copied to run example_inputs: "):
        rewrite_(model, ExpansionConfig(granularity="channel"), example_inputs=torch.randn(2, 3, 8, 8))
    rewrite_(model)
    model(torch.randn(2, 3, 8, 8))


def test_ones_of_somebody():
    model = nn.Sequential(LazyScale(), nn.ReLU(), LazyScale())
    rewrite_(model)
    assert model[1].coefficients.dtype == torch.float64
    model(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    assert model[1].coefficients.grad is not None
