import sys

import onnxruntime
import pytest
import torch

from ortho_fx import ExpansionConfig, OrthoFxError, rewrite_
from ortho_fx.cli import export
from ortho_fx.cli.parser import Parser
from ortho_fx.models.convnext import ConvNeXt, ConvNeXtConfig
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.models.weights.bundle import save_weights

pytestmark = pytest.mark.slow


def run(capsys, *arguments):
    parser = Parser(prog="ortho-fx")
    export.add(parser.add_subparsers())
    parsed = parser.parse_args(["export", *map(str, arguments)])
    assert parsed.run(parsed) == 0
    return capsys.readouterr()


def error_of(capsys, *arguments):
    with pytest.raises(OrthoFxError) as caught:
        run(capsys, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def language_model(tmp_path):
    model = GPT2(GPT2Config(11, 8, 1, 2, 8))
    rewrite_(model, ExpansionConfig("fourier", 2))
    save_weights(model, tmp_path / "gpt2.safetensors", {})
    return model, tmp_path / "gpt2.safetensors"


@pytest.fixture
def image_model(tmp_path):
    def saved(description, channels=1):
        model = ConvNeXt(ConvNeXtConfig(channels, 3, 2, (1, 1), (4, 6), layer_scale=1.0))
        rewrite_(model, ExpansionConfig("hermite"))
        save_weights(model, tmp_path / "run" / "model.safetensors", description)
        return tmp_path / "run"

    return saved


def test_weights_become_an_onnx_file(capsys, tmp_path, language_model):
    model, weights = language_model
    out, err = run(capsys, weights, tmp_path / "out" / "gpt2.onnx", "--freeze", "--dynamic-batch")
    first, second, third = out.splitlines()
    assert first == "1 expansions frozen"
    assert second.startswith(f"{tmp_path}/out/gpt2.onnx: 0.0")
    assert second.endswith(" MB, takes tokens (batch, 8) int64")
    assert third.startswith("largest difference from the model in onnxruntime ")
    assert err == ""
    session = onnxruntime.InferenceSession(tmp_path / "out" / "gpt2.onnx", providers=["CPUExecutionProvider"])
    tokens = torch.arange(24).reshape(3, 8) % 11
    (logits,) = session.run(None, {"tokens": tokens.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model.eval()(tokens).detach(), rtol=1e-5, atol=1e-5)


def test_a_run_becomes_a_program_for_its_images(capsys, tmp_path, image_model):
    directory, file = image_model({"run": {"data": "digits"}}), tmp_path / "digits.pt2"
    out = run(capsys, directory, file, "--batch-size", 3).out
    assert "takes images (3, 1, 8, 8) float32" in out
    images = torch.randn(3, 1, 8, 8)
    assert torch.export.load(file).module()(images).shape == (3, 3)


def test_the_size_of_the_images_is_that_of_the_run(capsys, monkeypatch, image_model):
    def taken(directory, *options):
        shapes = []
        monkeypatch.setattr("ortho_fx.export.export_program", lambda model, x, out, **_: shapes.append(tuple(x.shape)))
        run(capsys, directory, "model.pt2", *options)
        return shapes[0]

    assert taken(image_model({"run": {"data": "digits"}})) == (1, 1, 8, 8)
    assert taken(image_model({"run": {"data": "fashion", "image_size": None}})) == (1, 1, 28, 28)
    assert taken(image_model({"run": {"data": "photographs", "image_size": 96}}, channels=3)) == (1, 3, 96, 96)
    assert taken(image_model({}, channels=3)) == (1, 3, 224, 224)
    assert taken(image_model({}, channels=3), "--image-size", "12", "--dynamic-batch") == (2, 3, 12, 12)


def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, language_model, image_model):
    monkeypatch.chdir(tmp_path)
    directory = image_model({})
    assert error_of(capsys, "run", "model.bin") == "OUT must end in .onnx or .pt2; got model.bin"
    assert error_of(capsys, "nowhere", "a.pt2").startswith("weights are files in .safetensors, ")
    assert error_of(capsys, "run", "a.pt2", "--batch-size", 0) == (
        "argument --batch-size: must be a whole number from 1 up; got '0'"
    )
    assert error_of(capsys, "run", "a.pt2", "--image-size", 3) == (
        "--image-size must be 4 or more for this convnext; got 3"
    )
    assert error_of(capsys, "gpt2.safetensors", "a.pt2", "--image-size", 8) == (
        "--image-size is for a convnext, and gpt2.safetensors is a gpt2"
    )
    assert error_of(capsys, "run", "a.pt2", "--batch-size", 2, "--dynamic-batch") == (
        "argument --dynamic-batch: not allowed with argument --batch-size"
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert error_of(capsys, "run", "a.onnx") == "ONNX files need libraries: pip install onnx onnxscript onnxruntime"
    plain = ConvNeXt(ConvNeXtConfig(1, 3, 2, (1,), (4,)))
    save_weights(plain, directory / "model.safetensors", {})
    assert error_of(capsys, "run", "a.pt2", "--freeze") == "ConvNeXt holds no expansion to freeze: call rewrite_ first"
    assert not list(tmp_path.glob("a.*"))
