"""Folders of `ortho-fx export --to`: transformers and timm load them, and compute what the model computes."""

import json
import subprocess
import sys

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file

import ortho_fx
from ortho_fx import ExpansionConfig, freeze_, rewrite_, rewrite_like_
from ortho_fx.cli import main
from ortho_fx.models.convnext import PRESETS, ConvNeXt, ConvNeXtConfig
from ortho_fx.models.data.prepare import prepare
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.models.weights.bundle import save_weights

pytestmark = pytest.mark.slow

TEXT = "".join(map(chr, range(1, 256))) + "Wörter, words: épée.\n"
IMAGES = torch.randn(2, 3, 64, 64)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spread(model):
    """Values far from those of a start, so that an entry in the wrong place shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def language_model(expansion=None, vocabulary=256):
    model = GPT2(GPT2Config(vocabulary, 16, 2, 2, 8))
    if expansion is not None:
        rewrite_(model, expansion, example_inputs=torch.arange(8)[None])
    return spread(model)


def image_model(expansion=None, depths=(1, 2, 1, 1)):
    model = ConvNeXt(ConvNeXtConfig(3, 5, 4, depths, (4, 6, 8, 10), layer_scale=1.0))
    if expansion is not None:
        rewrite_(model, expansion, example_inputs=IMAGES)
    return spread(model)


def exported(capsys, model, to, *options, data="standard-library"):
    """The lines of the command that exports a model to the folder "out"."""
    save_weights(model, "run/model.safetensors", {"run": {"data": str(data)}})
    code = main(["export", "run", "--to", to, "out", *options])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out.splitlines()


# In a process that knows nothing of ortho_fx.
PLAIN = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("out")
tokenizer = transformers.AutoTokenizer.from_pretrained("out")
torch.save((model(torch.arange(12)[None]).logits, tokenizer("def f():").input_ids), "plain.pt")
assert "ortho_fx" not in sys.modules
"""


def test_a_gpt2_without_expansions_is_one_of_transformers(capsys, tmp_path):
    model = language_model()
    lines = exported(capsys, model, "transformers")
    assert lines[0].startswith("out: 0.0")
    assert lines[0].endswith(" MB, takes tokens (batch, up to 16) int64")
    assert lines[1].startswith(f"largest difference from the model in transformers {transformers.__version__}: ")
    assert lines[2:] == ['load it: transformers.AutoModelForCausalLM.from_pretrained("out")']
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    subprocess.run([sys.executable, "-c", PLAIN], check=True)
    logits, ids = torch.load("plain.pt")
    torch.testing.assert_close(logits, model(torch.arange(12)[None]), rtol=1e-5, atol=1e-5)
    assert ids == list(b"def f():")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert tokenizer(TEXT).input_ids == list(TEXT.encode())
    assert tokenizer.decode(list(TEXT.encode())) == TEXT
    # The names are those of the checkpoints of transformers, and ours reads them again.
    names = set(load_file("out/model.safetensors"))
    assert names == {name for name in transformers.AutoModelForCausalLM.from_pretrained("out").state_dict()} - {
        "lm_head.weight"
    }
    assert main(["sample", "out", "--prompt", "def ", "--tokens", "5", "--seed", "1"]) == 0
    sampled = capsys.readouterr().out
    assert main(["sample", "run", "--prompt", "def ", "--tokens", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out == sampled


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "expansion", [ExpansionConfig("fourier", 3), ExpansionConfig("hermite", granularity="channel", clamp=3.0)], ids=str
)
def test_expansions_come_along_to_transformers(capsys, expansion, frozen):
    model = language_model(expansion)
    lines = exported(capsys, model, "transformers", *["--freeze"] * frozen)
    assert lines[-2] == "before it is loaded: ortho_fx.integrations.transformers.enable()"
    if frozen:
        freeze_(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained("out")
    tokens = torch.randint(256, (2, 16))
    torch.testing.assert_close(loaded(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    assert type(loaded.transformer.h[1].mlp.act) is type(model.blocks[1].mlp.act)


def test_the_tokenizer_of_prepared_tokens_comes_along(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("some words and words\n" * 200)
    prepare(tmp_path / "a.txt", "tokens", tokenizer="bpe", vocabulary=270)
    meta = json.loads((tmp_path / "tokens" / "meta.json").read_text())
    exported(capsys, language_model(vocabulary=meta["vocabulary"]), "transformers", data="tokens")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert tokenizer.decode(tokenizer("some words").input_ids) == "some words"
    assert len(tokenizer("some words").input_ids) < 5
    assert tokenizer.eos_token_id == meta["end_of_text"]
    config = transformers.AutoConfig.from_pretrained("out")
    assert (config.vocab_size, config.eos_token_id) == (meta["vocabulary"], meta["end_of_text"])
    # The tokens are gone: the model is written, and what is missing is said.
    (tmp_path / "out").rename("first")
    lines = exported(capsys, language_model(vocabulary=meta["vocabulary"]), "transformers", data="gone")
    assert lines[-1] == ("it has no tokenizer, since what its tokens mean is not known: --tokenizer FILE adds one")
    assert not [path.name for path in (tmp_path / "out").glob("tokenizer*")]


def test_a_convnext_is_one_of_timm(capsys):
    model = image_model()
    lines = exported(capsys, model, "timm", "--image-size", "64")
    assert lines[1].startswith(f"largest difference from the model in timm {timm.__version__}: ")
    assert lines[2:] == ['load it: timm.create_model("local-dir:out", pretrained=True)']
    loaded = timm.create_model("local-dir:out", pretrained=True).eval()
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, 64, 64)
    # Another number of classes gets a fresh head, as with all of timm's weights.
    assert timm.create_model("local-dir:out", pretrained=True, num_classes=7)(IMAGES).shape == (2, 7)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_expansions_come_along_to_timm(capsys, granularity, frozen):
    model = image_model(ExpansionConfig("hermite", granularity=granularity))
    lines = exported(capsys, model, "timm", *["--freeze"] * frozen)
    namespace = {"timm": timm, "ortho_fx": ortho_fx, "safetensors": __import__("safetensors.torch")}
    for line in lines[-3:]:
        exec(line.removeprefix("load it: ").strip(), namespace)
    loaded = namespace["model"].eval()
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
    # timm alone would compute something else, and says so.
    with pytest.raises(RuntimeError, match="Unexpected key"):
        timm.create_model("local-dir:out", pretrained=True)


def test_a_published_size_has_its_name_in_timm(capsys, tmp_path, monkeypatch):
    model = image_model()
    monkeypatch.setitem(PRESETS, "s", model.config)
    exported(capsys, model, "timm")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == "convnext_small"


def test_rewrite_like_reads_the_folder(capsys):
    model = image_model(ExpansionConfig("fourier", 2))
    exported(capsys, model, "timm")
    fresh = timm.create_model("local-dir:out")
    assert len(rewrite_like_(fresh, "out").replaced) == 5
