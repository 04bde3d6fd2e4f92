"""torchao quantizes the linear layers around expansions and leaves these alone, whatever is done first."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ortho_fx
from ortho_fx import ExpansionConfig, OrthoFxError, param_groups, rewrite_, rewrite_like_

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchao = pytest.importorskip("torchao")
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")

pytestmark = pytest.mark.slow
X = torch.linspace(-2, 2, 256).reshape(4, 64)
INT4 = quantization.Int8DynamicActivationIntxWeightConfig(
    weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(32)
)
CONFIGS = {
    "int8": quantization.Int8WeightOnlyConfig(),
    "int8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
    "int4 dynamic": INT4,
    "intx": quantization.IntxWeightOnlyConfig(),
    "float8": quantization.Float8WeightOnlyConfig(),
}


class Net(nn.Module):
    """One activation is a module, and one is called in source."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b, self.c = nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.c(F.gelu(self.b(self.act(self.a(x)))))


def made(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def rewritten(model, granularity="channel", dtype=torch.float32):
    report = rewrite_(model, ExpansionConfig("fourier", 3, granularity=granularity), example_inputs=X.to(dtype))
    assert len(report.replaced) == 2
    return model


def quantized(model, config):
    quantization.quantize_(model, config)
    return model


def by_hand(model, config):
    for name in ("a", "b", "c"):
        holder = nn.Sequential(getattr(model, name))
        quantization.quantize_(holder, config)
        setattr(model, name, holder[0])
    return model


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_linear_layers_are_quantized_and_nothing_else(kind, granularity, dtype):
    config, x = CONFIGS[kind], X.to(dtype)
    expected = by_hand(rewritten(made(dtype), granularity, dtype), config)(x)
    after = quantized(rewritten(made(dtype), granularity, dtype), config)
    before = rewritten(quantized(made(dtype), config), granularity, dtype)
    for model in (after, before):
        assert torch.equal(model(x), expected)
        for module in (model.act, model.gelu_expansion_0):
            assert {type(one) for one in module.parameters()} == {nn.Parameter}
            assert {one.dtype for one in module.parameters()} == {dtype}


def test_a_quantized_model_is_saved_loaded_calibrated_and_reverted(tmp_path):
    model = quantized(rewritten(made()), CONFIGS["int8"])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    with torch.device("meta"):
        again = Net().eval()
    rewrite_like_(again, state)
    again.load_state_dict(state, assign=True)
    assert torch.equal(again(X), model(X))
    ortho_fx.save_expansions(model, tmp_path / "expansions.safetensors")
    other = quantized(made(), CONFIGS["int8"])
    rewrite_like_(other, tmp_path / "expansions.safetensors")
    assert torch.equal(other(X), model(X))
    assert len(ortho_fx.calibrate_(copy.deepcopy(model), [X]).sites) == 2
    ortho_fx.revert_(other)
    assert torch.equal(other(X), quantized(made(), CONFIGS["int8"])(X))


def test_a_fit_meets_the_quantized_inputs():
    model = quantized(made(), CONFIGS["int8"])
    expected = model(X)
    rewrite_(model, ExpansionConfig("fourier", 6, init="fit"), example_inputs=X)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("is_first", [True, False])
def test_quantization_aware_training_trains_expansions(is_first):
    prepare, convert = (qat.QATConfig(INT4, step=step) for step in ("prepare", "convert"))
    model = rewritten(made()) if is_first else made()
    quantization.quantize_(model, prepare)
    if not is_first:
        rewritten(model)
    start = [one.clone() for one in model.act.parameters()]
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.1))
    model(X).square().mean().backward()
    optimizer.step()
    assert not any(map(torch.equal, start, model.act.parameters()))
    expected = model(X)
    quantization.quantize_(model, convert)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)


def test_float8_training_leaves_them_alone():
    float8 = pytest.importorskip("torchao.float8")
    config = float8.Float8LinearConfig(emulate=True)
    after = float8.convert_to_float8_training(rewritten(made()), config=config)
    before = rewritten(float8.convert_to_float8_training(made(), config=config))
    assert torch.equal(after(X), before(X))
    after(X).sum().backward()
    assert after.act.coefficients.grad is not None


def test_compiled_and_exported_it_is_the_same():
    model = quantized(rewritten(made()), CONFIGS["int8"])
    expected = model(X)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(X), expected)
    assert torch.equal(torch.export.export(model, (X,)).module()(X), expected)


def test_quantized_coefficients_are_refused():
    model = rewritten(made())
    quantization.quantize_(model, quantization.FqnToConfig({"act.coefficients": CONFIGS["int8"]}), filter_fn=None)
    with pytest.raises(OrthoFxError, match=r"act: coefficients is quantized \(Int8Tensor\); an expansion has a few"):
        model(X)
    with pytest.raises(AssertionError, match="requires module to have"):  # torchao's own
        quantization.quantize_(rewritten(made()), CONFIGS["int8"], filter_fn=lambda module, name: name == "act")
