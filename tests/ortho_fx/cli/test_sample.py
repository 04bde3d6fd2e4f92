"""`ortho-fx sample` prints text of runs and of weights, and says in one line what it cannot sample."""

import pytest
import torch

from ortho_fx.cli import main
from ortho_fx.cli.mistakes import quoted
from ortho_fx.models.convnext import ConvNeXt, ConvNeXtConfig
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.models.sample import sample
from ortho_fx.models.weights.bundle import load_model, save_weights


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_weights(
        GPT2(GPT2Config(256, 8, 1, 2, 8)), tmp_path / "run" / "model.safetensors", {"run": {"data": "standard-library"}}
    )
    return "run"


def printed(capsys, *arguments):
    code = main(["sample", *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_the_text_is_that_of_the_api(capsys, run):
    drawn = sample(
        load_model("run/model.safetensors"),
        torch.tensor(list(b"def ")),
        30,
        temperature=0.5,
        top_k=90,
        generator=torch.Generator().manual_seed(7),
    )
    options = ["--prompt", "def ", "--tokens", "30", "--temperature", "0.5", "--top-k", "90", "--seed", "7"]
    text = bytes(list(b"def ") + drawn.tolist()).decode(errors="replace")
    shown = printed(capsys, run, *options)
    assert shown == printed(capsys, "run/model.safetensors", *options)
    assert shown == quoted(text, lines=True) + "\n"
    assert printed(capsys, run) == printed(capsys, run, "--seed", "0", "--tokens", "200", "--temperature", "0.8")


def test_mistakes_are_one_line(capsys, run, tmp_path):
    save_weights(ConvNeXt(ConvNeXtConfig(1, 3, 2, (1,), (4,))), tmp_path / "images" / "model.safetensors", {})
    (tmp_path / "cut.json").write_text("{}")
    expected = {
        (run, "--prompt", ""): "the prompt is empty: leave --prompt out for the start of a text",
        (run, "--top-k", "257"): "top_k must be from 1 to 256, the number of tokens to draw from; got 257",
        (run, "--temperature", "-1"): "argument --temperature: must be a finite number, 0 or more; got '-1'",
        (run, "--tokens", "0"): "argument --tokens: must be a whole number from 1 to 1000000; got '0'",
        ("images",): "images is a convnext, which makes no text: only a gpt2 does",
        ("nowhere.safetensors",): "there is no file nowhere.safetensors",
    }
    for arguments, message in expected.items():
        assert main(["sample", *arguments]) == 2
        assert capsys.readouterr() == ("", f"ortho-fx: error: {message}\n")
    assert main(["sample", run, "--tokenizer", "cut.json"]) == 2
    assert capsys.readouterr().err.startswith("ortho-fx: error: cut.json is not a tokenizer.json: ")


def test_a_prompt_of_bytes_that_a_small_vocabulary_lacks_is_told(capsys, run):
    save_weights(GPT2(GPT2Config(128, 8, 1, 2, 8)), "run/model.safetensors", {"run": {"data": "standard-library"}})
    assert main(["sample", run, "--prompt", "é"]) == 2
    told = "the prompt has token 195, and the model knows those from 0 to 127"
    assert capsys.readouterr().err == f"ortho-fx: error: {told}\n"
