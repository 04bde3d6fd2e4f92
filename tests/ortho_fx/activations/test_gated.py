"""Gated expansions: products in modules of ours and of others, fused as one kernel each way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, GatedExpansion, OrthoFxError, calibrate_, expansion_config, gains, rewrite_
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.bases import BASES
from ortho_fx.models import gpt2
from ortho_fx.operators.generated_code import count_kernels, generated_code


def noise(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("gate_last", [False, True])
def test_halves_and_two_inputs_are_the_same_product(gate_last):
    gate = GatedExpansion("fourier4", gate_last=gate_last, dim=1, dtype=torch.float64)
    x = noise(3, 8, 5).requires_grad_()
    first, second = x.chunk(2, 1)
    expected = gate.expansion(second) * first if gate_last else gate.expansion(first) * second
    for y in (gate(x), gate(first, second)):
        torch.testing.assert_close(y, expected)
    assert torch.autograd.gradcheck(gate, x)


def test_halves_that_differ_are_refused():
    gate = GatedExpansion()
    with pytest.raises(OrthoFxError, match=r"splits dimension -1 into halves; got shape \(2, 5\), with an odd number"):
        gate(torch.ones(2, 5))
    with pytest.raises(OrthoFxError, match=r"multiplies tensors of one shape; got \(2, 4\) and \(2, 3\)"):
        gate(torch.ones(2, 4), torch.ones(2, 3))


@pytest.mark.parametrize("basis", BASES)
def test_the_gains_of_the_product_are_one_before_and_after_calibration(basis):
    result = gains(GatedExpansion(basis, dtype=torch.float64))
    assert (result.forward, result.backward) == pytest.approx((1, 1), abs=1e-9)
    model = nn.Sequential(nn.Linear(16, 64), GatedExpansion(basis)).double()
    x = noise(2000, 16)
    calibrate_(model, [x])
    gate, value = model[0](x).detach().chunk(2, -1)
    forward = model(x).square().mean() / value.square().mean()
    assert forward.item() == pytest.approx(1, abs=0.15)
    unit = gains(model[1], gate.mean().item(), gate.std().item())
    assert (unit.forward, unit.backward) == pytest.approx((1, 1), abs=0.02)


def test_a_gated_config_travels():
    config = ExpansionConfig("hermite", gated=True)
    assert ExpansionConfig.from_dict(config.to_dict()) == config
    assert "gated" not in ExpansionConfig("hermite").to_dict()
    model = nn.Sequential(GatedExpansion(config))
    assert expansion_config(model)["sites"]["0.expansion"]["gated"] is True
    with pytest.raises(OrthoFxError, match=r"^gated must be True or False; got 1$"):
        ExpansionConfig(gated=1)


def counted(model, *inputs):
    """The number of kernels that are not matrix products, forward and backward; and the results beside eager ones."""
    torch.compiler.reset()
    twin = copy.deepcopy(model)
    with generated_code() as codes:
        outcomes = []
        for function, its in ((torch.compile(model), model), (twin, twin)):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            y = function(*leaves)
            y.square().mean().backward()
            outcomes.append([y.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in its.parameters())])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    return count_kernels(codes)


@pytest.mark.slow
def test_a_gate_is_one_kernel_each_way():
    x, other = (noise(64, 48, dtype=torch.float32, seed=seed) for seed in (0, 1))
    # The second kernel of the backward pass adds up the partial sums of the coefficients' gradients.
    assert counted(GatedExpansion("hermite3"), x, other) == {"forward": 1, "backward": 2}
    assert counted(GatedExpansion("safe_rational", gate_last=True), x) == {"forward": 1, "backward": 2}


def expansions_of(model):
    return [module for module in model.modules() if isinstance(module, ExpansionActivation)]


@pytest.mark.slow
@pytest.mark.parametrize("function", ["silu", "gelu_pytorch_tanh"])
def test_the_mlp_of_llama_is_fused_as_it_was(function):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = modeling.LlamaConfig(hidden_size=32, intermediate_size=64, hidden_act=function)
    torch.manual_seed(0)
    mlp = modeling.LlamaMLP(config)
    x = noise(8, 16, 32, dtype=torch.float32)
    before = counted(mlp, x)
    rewrite_(mlp, ExpansionConfig("hermite", 3, gated=True))
    assert [one.config.gated for one in expansions_of(mlp)] == [True]
    after = counted(mlp, x)
    assert after["forward"] == before["forward"]
    assert after["backward"] == before["backward"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GluMlp", "SwiGLU", "SwiGLUPacked"])
def test_the_mlps_of_timm_are_fused_as_they_were(name):
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    made = getattr(layers, name)
    settings = {"act_layer": nn.SiLU} if name == "GluMlp" else {}
    mlp = made(32, 64, **settings)
    x = noise(8, 16, 32, dtype=torch.float32)
    before = counted(mlp, x)
    report = rewrite_(mlp, ExpansionConfig("gelu_series", 3, gated=True))
    assert [site.function for site in report.replaced] == ["silu"]
    after = counted(mlp, x)
    assert after["forward"] == before["forward"]
    assert after["backward"] == before["backward"] + 1


def test_gpt2_with_gated_mlps_has_as_many_parameters_and_takes_expansions():
    plain, gated = (gpt2.GPT2(gpt2.GPT2Config(256, 16, 2, 2, 48, gated=one)) for one in (False, True))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (plain, gated)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    mlp = gated.blocks[0].mlp
    h = noise(4, 48, dtype=torch.float32)
    torch.testing.assert_close(mlp(h), mlp.projection(F.silu(mlp.gate(h)) * mlp.expand(h)))
    report = rewrite_(gated, ExpansionConfig("silu_series", init="exact", gated=True))
    assert [site.function for site in report.replaced] == ["silu", "silu"]
    torch.testing.assert_close(mlp(h), mlp.projection(F.silu(mlp.gate(h)) * mlp.expand(h)), rtol=1e-4, atol=1e-6)
