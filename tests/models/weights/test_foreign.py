"""What no folder of another library can hold is refused in one line, before that library is needed."""

import sys

import pytest

from ortho_fx.cli import main
from ortho_fx.models.convnext import ConvNeXt, ConvNeXtConfig
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.models.weights.bundle import save_weights
from ortho_fx.models.weights.layouts import TIMM, TRANSFORMERS, convert, names_in

SMALL = {"vocabulary": 11, "context": 8, "layers": 2, "heads": 2, "width": 12}
STAGES = {"classes": 3, "depths": (1, 2, 1, 1), "widths": (4, 6, 8, 10)}


@pytest.mark.parametrize(
    ("layout", "model"),
    [(TRANSFORMERS, GPT2(GPT2Config(**SMALL))), (TIMM, ConvNeXt(ConvNeXtConfig(**STAGES)))],
    ids=["transformers", "timm"],
)
def test_the_names_of_a_layout_lead_back_to_ours(layout, model):
    state = model.state_dict()
    names = names_in(layout, state)
    assert len(set(names.values())) == len(names) == len(state) - (layout is TRANSFORMERS)
    theirs = {
        names[name]: tensor.t() if ".c_" in names[name] else tensor for name, tensor in state.items() if name in names
    }
    weights = convert(theirs, {"n_head": 2, "n_embd": 12} if layout is TRANSFORMERS else None)
    assert {name: tuple(tensor.shape) for name, tensor in weights.state.items()} == {
        name: tuple(state[name].shape) for name in names
    }
    assert (weights.config.gated, len(weights.state)) == (False, len(names))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gated = ConvNeXtConfig(**STAGES, gated=True)
    models = {
        "text": GPT2(GPT2Config(**SMALL)),
        "gated-text": GPT2(GPT2Config(**SMALL, gated=True)),
        "images": ConvNeXt(ConvNeXtConfig(**STAGES)),
        "gated-images": ConvNeXt(gated),
        "digits": ConvNeXt(ConvNeXtConfig(1, 10, 2, (2, 2), (4, 6))),
    }
    for name, model in models.items():
        save_weights(model, f"{name}/model.safetensors", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()


def test_refusals_are_one_line(capsys, runs, tmp_path, monkeypatch):
    files = "export it to .onnx or .pt2"
    expected = {
        ("images", "transformers"): "transformers takes a gpt2 of ours; a ConvNeXt goes to timm",
        ("text", "timm"): "timm takes a convnext of ours; a GPT2 goes to transformers",
        ("gated-text", "transformers"): f"transformers' GPT-2 has no gated MLPs, and this one has: {files}",
        ("gated-images", "timm"): f"timm's ConvNeXt has no gated MLPs, and this one has: {files}",
        ("digits", "timm"): "timm's ConvNeXt has 4 stages and patches of 4 pixels, and this one has 2 and 2: " + files,
        (
            "text",
            "transformers",
            "--batch-size",
            "3",
        ): "--batch-size is for files in .onnx and .pt2: transformers takes any batch",
        ("images", "timm", "--dynamic-batch"): "--dynamic-batch is for files in .onnx and .pt2: timm takes any batch",
        ("text", "transformers", "--image-size", "8"): "--image-size is for images, and --to transformers for a gpt2",
        ("images", "timm", "--tokenizer", "bytes"): "--tokenizer goes with --to transformers",
        ("text", "transformers", "--tokenizer", "nope"): "there is no tokenizer nope: --tokenizer is bytes, or a "
        "tokenizer.json",
    }
    for (weights, to, *options), message in expected.items():
        assert main(["export", weights, "out", "--to", to, *options]) == 2
        assert capsys.readouterr() == ("", f"ortho-fx: error: {message}\n")
    for weights, to in (("text", "transformers"), ("images", "timm")):
        monkeypatch.setitem(sys.modules, to, None)
        assert main(["export", weights, "out", "--to", to]) == 2
        told = f"ortho-fx: error: a folder for {to} is checked by {to}: pip install {to}"
        assert capsys.readouterr().err.startswith(told)
    assert not (tmp_path / "out").exists()
