"""Exported models run elsewhere: in onnxruntime, and in a process that does not know ortho_fx."""

import itertools
import logging
import math
import resource
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, OrthoFxError, freeze_, rewrite_
from ortho_fx.export import export_onnx, export_program
from ortho_fx.models.convnext import ConvNeXt, ConvNeXtConfig
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from tests.kinds import KINDS, config_of

pytestmark = pytest.mark.slow

CONFIGS = [config_of(kind, 2) for kind in KINDS]
CONFIGS += [config_of(kind, 2, granularity="channel", clamp=1.5) for kind in KINDS]
TOKENS = torch.arange(32).reshape(2, 16) % 11


class Branches(nn.Module):
    """Several activations of one layer's output, each with an output of its own."""

    def __init__(self, count):
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.branches = nn.ModuleList(nn.GELU() for _ in range(count))

    def forward(self, x):
        y = self.up(x)
        return [branch(y) for branch in self.branches]


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learned(model, config, x):
    """The rewritten model; its expansions all differ, as after training."""
    rewrite_(model, config, example_inputs=x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def branches(configs):
    torch.manual_seed(0)
    by_name = {f"branches.{i}": config for i, config in enumerate(configs)}
    return learned(Branches(len(configs)), by_name, inputs(8, 4))


def mlp():
    torch.manual_seed(0)
    return learned(nn.Sequential(nn.Linear(4, 6), nn.GELU()), ExpansionConfig(degree=2), inputs(8, 4))


def in_onnxruntime(path, **arrays):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, arrays)


def assert_equal(actual, expected):
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def error_of(*arguments, export=export_program, **settings):
    with pytest.raises(OrthoFxError) as caught:
        export(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_in_onnxruntime(tmp_path, caplog, recwarn):
    model, path = branches(CONFIGS), tmp_path / "model.onnx"
    report = export_onnx(model, inputs(3, 4), path, dynamic_batch=True)
    x = inputs(7, 4, seed=2)
    outputs = in_onnxruntime(path, x=x.numpy())
    assert len(outputs) == len(CONFIGS)
    for actual, expected in zip(outputs, model(x), strict=True):
        assert_equal(actual, expected)
    file = onnx.load(path)
    assert {node.domain for node in file.graph.node} == {""}
    assert not file.functions
    assert b"test_export.py" not in path.read_bytes()
    assert (report.path, report.size, report.inputs) == (path, path.stat().st_size, ("x (batch, 4) float32",))
    assert 0 <= report.relative_difference < 1e-5
    assert str(report).startswith(f"{path}: 0.")
    assert f"largest difference from the model in onnxruntime {onnxruntime.__version__}: " in str(report)
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (loud, list(recwarn)) == ([], [])
    assert list(tmp_path.iterdir()) == [path]


WITHOUT_ORTHO_FX = """
import sys, torch
sys.modules["ortho_fx"] = None  # an import of it would fail
module = torch.export.load(sys.argv[1]).module()
torch.save((module(torch.load(sys.argv[2])), sorted(dict(module.named_parameters()))), sys.argv[3])
"""


def test_every_kind_in_a_process_without_ortho_fx(tmp_path):
    model, x = branches(CONFIGS[len(KINDS) :]), inputs(7, 4, seed=2)
    report = export_program(model, inputs(3, 4), tmp_path / "model.pt2", dynamic_batch=True)
    assert report.inputs == ("x (batch, 4) float32",)
    torch.save(x, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "x.pt", "y.pt")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_ORTHO_FX, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs, names = torch.load(tmp_path / "y.pt")
    for actual, expected in zip(outputs, model(x), strict=True):
        assert_equal(actual.detach().numpy(), expected)
    assert names == sorted(dict(model.named_parameters()))


def test_models_in_onnxruntime(tmp_path):
    gpt2 = learned(GPT2(GPT2Config(11, 16, 1, 2, 8, dropout=0.5)), ExpansionConfig("fourier", 2), TOKENS)
    freeze_(gpt2)
    config = ConvNeXtConfig(1, 5, 2, (1, 1), (4, 6), drop_path=0.5, layer_scale=1.0)
    convnext = learned(ConvNeXt(config), ExpansionConfig("hermite", granularity="channel"), inputs(2, 1, 8, 8))
    for model, example, name in ((gpt2, TOKENS, "tokens"), (convnext, inputs(2, 1, 8, 8), "images")):
        path = tmp_path / f"{name}.onnx"
        model.norm.eval()
        report = export_onnx(model, example, path)
        assert report.inputs == (f"{name} {tuple(example.shape)} {str(example.dtype).removeprefix('torch.')}",)
        assert (model.training, model.norm.training) == (True, False)  # as it was
        assert_equal(in_onnxruntime(path, **{name: example.numpy()})[0], model.eval()(example))
    # Attention stays one operator of PyTorch. Decomposed, each head of each layer would have a mask context x context.
    report = export_program(gpt2, {"tokens": TOKENS}, tmp_path / "gpt2.pt2")
    targets = {str(node.target) for node in torch.export.load(report.path).graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in targets
    assert report.inputs == ("tokens (2, 16) int64",)


class Counts(nn.Module):
    """Computes another result at each call, which a graph cannot do."""

    def __init__(self):
        super().__init__()
        self.calls = itertools.count(1)

    def forward(self, x):
        return x * next(self.calls)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Logarithm(nn.Module):
    def forward(self, x):
        return x.log()


class Unknown(nn.Module):
    def forward(self, x):
        return torch.lgamma(x.abs() + 1)


class Factorials(nn.Module):
    """Computes with log-gammas of constants, of 2 dimensions and of none."""

    def forward(self, x):
        orders = torch.arange(1.0, 5.0).reshape(2, 2)
        return x * torch.exp(-torch.lgamma(orders + 1)) + torch.lgamma(torch.full((), 3.5))


def test_log_gammas_of_constants_of_any_shape_are_folded(tmp_path):
    x = inputs(2, 2)
    export_onnx(Factorials(), x, tmp_path / "model.onnx")
    (y,) = in_onnxruntime(tmp_path / "model.onnx", x=x.numpy())
    assert_equal(y, x / torch.tensor([[1.0, 2.0], [6.0, 24.0]]) + math.lgamma(3.5))


def test_what_fails_the_check_is_not_written(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("an earlier one")
    assert error_of(Counts(), inputs(2, 4), path).startswith("the exported Counts is off by ")
    assert error_of(Counts(), inputs(2, 4), path).endswith(" of the largest output; allowed is 0.0001")
    message = "the outputs of Logarithm for the example inputs are not finite"
    assert error_of(Logarithm(), -torch.ones(2), path) == message
    assert path.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [path]
    assert export_program(Counts(), inputs(2, 4), path, tolerance=10).difference > 0.1


def test_mistakes_are_named_in_one_line(tmp_path, monkeypatch):
    model, path = mlp(), tmp_path / "model.onnx"
    assert error_of(model, inputs(2, 4), "model.bin") == "the file must end in .pt2; got model.bin"
    assert error_of(model, inputs(2, 4), path) == f"the file must end in .pt2; got {path}"
    assert error_of(model, inputs(2, 4), "model.pt2", export=export_onnx) == (
        "the file must end in .onnx; got model.pt2"
    )
    assert error_of(model, inputs(1, 4), path, export=export_onnx, dynamic_batch=True) == (
        "a dynamic batch needs example inputs of two members or more; got shape (1, 4)"
    )
    assert error_of(mlp().bfloat16(), inputs(2, 4).bfloat16(), path, export=export_onnx) == (
        "ONNX files are for float32 and float64, and 0.weight is half precision: call model.float()"
    )
    assert error_of(Branching(), inputs(2, 4), tmp_path / "model.pt2").startswith(
        "Branching cannot be made into a graph of torch.export: Could not guard on data-dependent expression"
    )
    assert error_of(Unknown(), inputs(2, 4), path, export=export_onnx).startswith(
        "Unknown cannot be made into an ONNX model: No ONNX function found for <OpOverload(op='prims.lgamma'"
    )
    (tmp_path / "file").write_text("")
    for folder, reason in (("file", "Not a directory"), ("file/folder", "Not a directory")):
        path = tmp_path / folder / "model.pt2"
        expected = f"cannot save {path}: {reason}; an earlier file there is untouched"
        assert error_of(model, inputs(2, 4), path) in (expected, expected.replace(reason, "File exists"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert error_of(model, inputs(2, 4), "model.onnx", export=export_onnx) == (
        "ONNX files need libraries: pip install onnx onnxscript onnxruntime"
    )


def test_a_program_on_a_full_disk_is_an_error_and_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OrthoFxError, match=r"cannot save .*model.pt2: File too large; an earlier file"):
            export_program(nn.Linear(64, 64), torch.randn(2, 64), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
