"""Gated expansions: products in modules of ours and of others, fused as one kernel each way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, GatedExpansion, OrthoFxError, calibrate_, expansion_config, gains, rewrite_
from ortho_fx.bases import BASES
from ortho_fx.models import gpt2
from tests.h100 import triton_code


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
    model = nn.Sequential(GatedExpansion(basis)).double()
    gate, value = 0.7 + 0.3 * noise(50_000), 2 * noise(50_000, seed=1)
    calibrate_(model, [torch.cat([gate, value])])
    forward = model(torch.cat([gate, value])).square().mean() / value.square().mean()
    assert forward.item() == pytest.approx(1, abs=0.03)
    unit = gains(model[0], gate.mean().item(), gate.std().item())
    assert (unit.forward, unit.backward) == pytest.approx((1, 1), abs=0.02)


def test_a_gated_config_travels():
    config = ExpansionConfig("hermite", gated=True)
    assert ExpansionConfig.from_dict(config.to_dict()) == config
    assert "gated" not in ExpansionConfig("hermite").to_dict()
    model = nn.Sequential(GatedExpansion(config))
    assert expansion_config(model)["sites"]["0.expansion"]["gated"] is True
    with pytest.raises(OrthoFxError, match=r"^gated must be True or False; got 1$"):
        ExpansionConfig(gated=1)


def llama(hidden, function="silu"):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = modeling.LlamaConfig(hidden_size=hidden, intermediate_size=2 * hidden, hidden_act=function)
    return modeling.LlamaMLP(config)


def timm(name):
    layers = pytest.importorskip("timm.layers")
    settings = {"act_layer": nn.SiLU} if name == "GluMlp" else {}
    packs = name != "SwiGLU"
    return lambda hidden: getattr(layers, name)(hidden, (2 + 2 * packs) * hidden, **settings)


def torchtitan(hidden):
    common = pytest.importorskip("torchtitan.models.common.feed_forward")
    sizes = {"w1": (hidden, 2 * hidden), "w2": (2 * hidden, hidden), "w3": (hidden, 2 * hidden)}
    made = {name: common.Linear.Config(in_features=a, out_features=b) for name, (a, b) in sizes.items()}
    return common.FeedForward(common.FeedForward.Config(**made))


MLPS = {
    "llama": llama,
    "torchtitan": torchtitan,
    "SwiGLU": timm("SwiGLU"),
    "GluMlp": timm("GluMlp"),
    "SwiGLUPacked": timm("SwiGLUPacked"),
    "gpt2": lambda hidden: gpt2.GatedMLP(gpt2.GPT2Config(width=hidden)),
}
every_mlp = pytest.mark.parametrize("name", MLPS)


@pytest.mark.slow
@every_mlp
def test_values_and_gradients_of_rewritten_mlps_are_those_of_eager_mode(name):
    torch.compiler.reset()
    torch.manual_seed(0)
    mlp, x = MLPS[name](32), noise(8, 16, 32, dtype=torch.float32).requires_grad_()
    report = rewrite_(mlp, ExpansionConfig("gelu_series", 3, gated=True))
    assert [site.function for site in report.replaced] == ["silu"]
    leaves = [x, *mlp.parameters()]
    y, expected = torch.compile(mlp)(x), mlp(x)
    torch.testing.assert_close(y, expected)
    actual, wanted = (torch.autograd.grad(each.square().sum(), leaves) for each in (y, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_mlp
def test_a_gate_is_one_kernel_each_way_on_a_gpu(name):
    """As before the rewrite, but for packed halves: then each half's gradient is written by a kernel of its own."""
    torch.compiler.reset()
    rows, hidden = 4096, 256
    mlp = MLPS[name](hidden)

    def kernels():
        x = torch.empty(8, rows // 8, hidden, device="meta", requires_grad=True)
        inner = mlp.gate.out_features if name == "gpt2" else 2 * hidden
        code = triton_code(mlp, x, whole=rows * inner)
        # Kernels that store a whole tensor; others sum for the gradient of a bias.
        return [[(k.loads, k.stores) for k in graph.big if k.stores] for graph in (code.forward, code.backward)]

    before = kernels()
    rewrite_(mlp, ExpansionConfig("hermite", 3, gated=True))
    packed = before != [[(2, 1)], [(3, 2)]]
    assert packed == (name in ("GluMlp", "SwiGLUPacked"))
    assert kernels() == ([[(2, 1)], [(3, 1), (3, 1)]] if packed else before)


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
