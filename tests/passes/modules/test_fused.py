"""Layers of PyTorch that compute an activation inside are listed with a reason, and never replaced."""

import pytest
import torch
from torch import nn
from torch.ao import quantization

from ortho_fx import find_sites, rewrite_

INSIDE = "computes it inside, in one operation with the rest of the layer"


def prepared():
    """Two convolutions with ReLU, fused for quantized training."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).train()
    model = quantization.fuse_modules_qat(model, [["0", "1", "2"], ["3", "4"]])
    held = [site.name for site in find_sites(model) if not site.reason]
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    return held, quantization.prepare_qat(model)


@pytest.mark.filterwarnings("ignore")
def test_layers_of_quantized_training_hold_it_before_and_compute_it_after():
    held, model = prepared()
    assert held == ["0.2", "3.1"]
    assert [(site.name, site.kind, site.function, site.reason) for site in find_sites(model)] == [
        ("0.relu", "fused", "relu", f"ConvBnReLU2d {INSIDE}"),
        ("3.relu", "fused", "relu", f"ConvReLU2d {INSIDE}"),
    ]


@pytest.mark.parametrize("layer", [nn.RNN, nn.RNNCell])
@pytest.mark.parametrize("function", ["relu", "tanh"])
def test_recurrent_layers(layer, function):
    model = nn.ModuleList([layer(4, 4, nonlinearity=function), nn.GELU()])
    report = rewrite_(model)
    assert [(site.name, site.reason) for site in report.left] == [(f"0.{function}", f"{layer.__name__} {INSIDE}")]
    assert [site.name for site in report.replaced] == ["1"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_scripted_children_are_listed_once_each_with_what_is_inside_them():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.GELU(), nn.ReLU())))
    sites = find_sites(nn.Sequential(scripted, nn.SiLU()))
    assert [(site.name, site.kind, site.function) for site in sites if site.reason] == [
        ("0.relu", "scripted", "relu"),
        ("0.gelu", "scripted", "gelu"),
        ("0.relu_1", "scripted", "relu"),
    ]
