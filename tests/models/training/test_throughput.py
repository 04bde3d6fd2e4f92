"""FLOPs agree with their formulas, and devices have their peaks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, rewrite_
from ortho_fx.models import convnext, gpt2
from ortho_fx.models.training.throughput import peak_flops, training_flops

pytestmark = pytest.mark.slow


def test_a_linear_layer_counts_its_products():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    first, second = 2 * 8 * 16, 2 * 16 * 4
    # Backward: gradients of both weights, and of the second layer's input; the first layer's input needs none.
    assert training_flops(model, torch.empty(5, 8)) == 2 * first + 3 * second
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    assert training_flops(model, torch.empty(5, 8)) == first + 2 * second


@pytest.mark.parametrize(("kind", "places"), [(nn.Conv2d, 5 * 5), (nn.ConvTranspose2d, 10 * 10)])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_count_their_products(kind, places, groups):
    convolution = kind(4, 8, 3, stride=2, padding=1, groups=groups)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), convolution)
    products = places * 4 * 8 // groups * 9
    # The second convolution also computes its input's gradient, which the first one does not need.
    assert training_flops(model, torch.empty(2, 4, 10, 10)) == 3 * 2 * products + 2 * 2 * (100 * 4 * 4)


@pytest.mark.parametrize("basis", [None, "hermite", "tropical"])
@pytest.mark.parametrize("size", ["tiny", "124m"])
def test_gpt2_counts_as_in_appendix_b_of_palm(size, basis):
    config = gpt2.PRESETS[size]
    if size == "tiny":
        model = gpt2.GPT2(config)
    else:
        # Parameters without memory, since the count depends on shapes alone.
        with torch.device("meta"):
            model = gpt2.GPT2(config)
    if basis is not None:
        rewrite_(model, ExpansionConfig(basis))
    # Positions are added, so they take no multiplications.
    parameters = sum(p.numel() for p in model.parameters()) - model.positions.weight.numel()
    a_token = 6 * parameters + 12 * config.layers * config.width * config.context
    counted = training_flops(model, torch.zeros(3, config.context, dtype=torch.long))
    assert counted == pytest.approx(a_token * config.context, rel=0.01)


def test_attention_counts_the_same_whatever_kernel_a_device_has():
    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    model = nn.Sequential(nn.Linear(16, 16), Attention())
    linear, attention = 2 * (2 * 32 * 16 * 16), 3 * 2 * (2 * 32 * 32 * 16)
    assert training_flops(model, torch.empty(2, 4, 32, 16)) == 4 * (linear + attention)


def test_a_convnext_of_published_size_has_its_published_flops():
    model = convnext.ConvNeXt(convnext.PRESETS["t"])
    # 4.5e9 multiply-adds forward (Liu et al., table 9), and about twice as many backward.
    assert training_flops(model, torch.empty(2, 3, 224, 224)) == pytest.approx(3 * 2 * 4.5e9, rel=0.05)


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, state = list(model.parameters()), torch.get_rng_state()
    assert training_flops(model, torch.empty(2, 1, 8, 8)) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float16, 989.4e12),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA A100-SXM4-80GB", torch.float64, None),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA A10G", torch.bfloat16, 70e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("NVIDIA B200", torch.bfloat16, 2250e12),
        ("NVIDIA GB200", torch.bfloat16, 2500e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA A1000", torch.bfloat16, None),
    ],
)
def test_peaks_by_the_name_of_the_device(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda", dtype) == peak


def test_float32_is_that_of_tf32_where_that_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(torch.device("cuda", 0), torch.float32) == 494.7e12


def test_a_cpu_has_no_peak():
    assert peak_flops("cpu", torch.float32) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_counted_like_a_cpu():
    model = gpt2.GPT2(gpt2.PRESETS["tiny"])
    tokens = torch.zeros(2, 128, dtype=torch.long)
    on_cpu = training_flops(model, tokens)
    assert training_flops(model.cuda(), tokens.cuda()) == on_cpu
