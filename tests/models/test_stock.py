"""Stock activations: their formulas, their starts, and how a model gets them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import OrthoFxError, PolyNormActivation
from ortho_fx.models import convnext, gpt2
from ortho_fx.models.stock import NAMES, XIELU, Normalised, Stock, calibrate_stock_, exchange_, root_mean_square

X = torch.linspace(-4, 4, 81, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu_squared", X.clamp(min=0) ** 2),
        ("leaky_relu_squared", torch.where(X > 0, X, X / 2) ** 2),
        ("sine", torch.sin(X)),
        ("tanh", torch.tanh(X)),
        ("prelu", torch.where(X > 0, X, X / 4)),
        ("silu", X * torch.sigmoid(X)),
        ("xielu", torch.where(X > 0, 0.8 * X**2 + X / 2, 0.8 * (torch.exp(X) - 1 - X) + X / 2)),
    ],
)
def test_a_formula(name, expected):
    torch.testing.assert_close(Stock(name).make().double()(X), expected, rtol=1e-6, atol=1e-6)


def test_xielu_does_not_overflow_and_keeps_the_dtype():
    x = torch.tensor([-200.0, 0.0, 200.0], requires_grad=True)
    module = XIELU()
    module(x).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[1] == module.slope
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert module(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in NAMES if name != "polynorm" and not name.startswith("torchortho")])
def test_a_rescaled_activation_has_outputs_of_mean_square_1(name):
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    y = Stock(name, start="rescaled").make()(z)
    assert y.square().mean().item() == pytest.approx(1, rel=0.03)


def test_the_root_mean_square_of_relu_is_known():
    assert root_mean_square(nn.ReLU()) == pytest.approx(math.sqrt(0.5), rel=1e-6)
    assert root_mean_square(nn.Identity()) == pytest.approx(1, rel=1e-6)


def test_a_calibrated_activation_keeps_the_mean_square_of_its_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    exchange_(model, lambda: Stock("gelu", start="calibrated").make())
    x = torch.randn(512, 8)
    calibrate_stock_(model, x)
    inputs = model[0](x)
    assert model[1].shift.item() == pytest.approx(inputs.mean().item(), rel=1e-4)
    z = (inputs - inputs.mean()) / inputs.std(correction=0)
    torch.testing.assert_close(model[1](inputs), inputs.std(correction=0) * F.gelu(z) / root_mean_square(nn.GELU()))
    gate = Normalised(nn.GELU(), gated=True)
    gate.calibrate(0.0, 2.0)
    torch.testing.assert_close(gate(inputs), F.gelu(inputs / 2) / root_mean_square(nn.GELU()))


def test_constant_inputs_cannot_be_calibrated():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    exchange_(model, lambda: Stock("gelu", start="calibrated").make())
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    with pytest.raises(OrthoFxError, match=r"^1 cannot be calibrated: its inputs are none, constant or not finite$"):
        calibrate_stock_(model, torch.randn(4, 2))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("model", ["gpt2", "convnext"])
def test_each_activation_of_our_models_is_exchanged(model, gated):
    if model == "gpt2":
        made = gpt2.GPT2(gpt2.GPT2Config(16, 8, 2, 2, 8, gated=gated))
        inputs = torch.randint(16, (2, 8))
    else:
        made = convnext.ConvNeXt(convnext.ConvNeXtConfig(1, 4, 2, (1, 1), (8, 8), layer_scale=1.0, gated=gated))
        inputs = torch.randn(2, 1, 8, 8)
    before = made(inputs)
    assert len(exchange_(made, nn.SiLU if gated else lambda: nn.GELU(approximate="tanh"))) == 2
    torch.testing.assert_close(made(inputs), before, atol=0 if gated else 1e-3, rtol=0 if gated else 1e-2)
    exchange_(made, lambda: PolyNormActivation(3))
    assert (made(inputs) - before).abs().max() > 1e-4


def test_one_activation_in_two_places_stays_one():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)
    assert exchange_(model, nn.PReLU) == ["1", "3"]
    assert model[1] is model[3]
    assert isinstance(model[1], nn.PReLU)


def test_gates_cost_as_many_parameters():
    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    for preset in ("tiny", "small", "t"):
        plain = convnext.PRESETS[preset]
        with torch.device("meta"):
            sizes = [count(convnext.ConvNeXt(replace(plain, gated=gated))) for gated in (False, True)]
        assert sizes[1] / sizes[0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mish", "a stock activation is one of gelu, gelu_tanh, relu, "),
        ("gelu:3", "gelu has no degree; got 3"),
        ("gelu:fast", "gelu may have a colon and one of calibrated, rescaled behind it"),
        ("polynorm:9", "degree of PolyNorm must be an integer from 1 to 8; got 9"),
        ("polynorm:rescaled", "polynorm normalises its own inputs, so it is not rescaled"),
    ],
)
def test_a_wrong_text_says_what_is_wrong(text, message):
    with pytest.raises(OrthoFxError) as caught:
        Stock.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["gelu", "polynorm:3", "polynorm:2", "sine:calibrated", "torchortho:fourier:5"])
def test_a_text_is_that_of_its_activation(text):
    assert str(Stock.parse(text)) == text
