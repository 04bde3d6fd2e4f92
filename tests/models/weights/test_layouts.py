"""State dicts of other libraries become our models, which agree with the references in `foreign_layouts`."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ortho_fx import ExpansionActivation, ExpansionConfig, OrthoFxError, rewrite_
from ortho_fx.models.convnext import ConvNeXt, ConvNeXtConfig
from ortho_fx.models.gpt2 import GPT2, PRESETS, GPT2Config
from ortho_fx.models.weights.bundle import save_weights
from ortho_fx.models.weights.layouts import convert, expansions_of, load_pretrained
from tests.kinds import KINDS, config_of
from tests.models.weights.foreign_layouts import (
    AUTHORS,
    CHANNELS,
    CLASSES,
    CONTEXT,
    DEPTHS,
    LAYERS,
    PATCH,
    TIMM,
    VOCABULARY,
    WIDTH,
    WIDTHS,
    convnext_logits,
    convnext_state,
    transformers_logits,
    transformers_state,
)

SETTINGS = {"model_type": "gpt2", "n_embd": WIDTH, "n_head": 3}
TOKENS = torch.tensor([[1, 5, 10, 0, 3, 3], [7, 7, 2, 9, 4, 1]])
IMAGES = torch.linspace(-2, 2, 2 * CHANNELS * 8 * 8, dtype=torch.float64).sin().reshape(2, CHANNELS, 8, 8)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def error_of(path, **settings):
    with pytest.raises(OrthoFxError) as caught:
        load_pretrained(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path.parent), "HERE")


def folder(path, state, settings=SETTINGS, name="pytorch_model.bin"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    torch.save(state, path / name)
    return path


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("heads", [1, 3])
def test_gpt2_of_transformers(tmp_path, prefix, heads):
    state = transformers_state(prefix)
    loaded = load_pretrained(folder(tmp_path / "folder", state, {**SETTINGS, "n_head": heads}))
    assert (loaded.kind, loaded.notes) == ("gpt2", ())
    assert loaded.model.config == GPT2Config(VOCABULARY, CONTEXT, LAYERS, heads, WIDTH)
    assert loaded.model.head.weight is loaded.model.tokens.weight
    close(loaded.model(TOKENS), transformers_logits(state, TOKENS, heads))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("parts", [1, 3])
def test_folders_in_safetensors_or_pickles_in_one_file_or_parts(tmp_path, name, parts):
    state = transformers_state()
    del state["lm_head.weight"]  # safetensors keeps a tied tensor once
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    names, where = list(state), {}
    for i in range(parts):
        part = {key: state[key] for key in names[i::parts]}
        file = name if parts == 1 else f"part-{i}.{name.split('.')[1]}"
        if name.endswith(".bin"):
            torch.save(part, tmp_path / file)
        else:
            save_file(part, tmp_path / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    if parts > 1:
        (tmp_path / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    loaded = load_pretrained(tmp_path)
    close(loaded.model(TOKENS), transformers_logits({**state, "lm_head.weight": None}, TOKENS, 3))
    if parts > 1:
        (tmp_path / "part-1.bin").unlink(missing_ok=True)
        (tmp_path / "part-1.safetensors").unlink(missing_ok=True)
        with pytest.raises(OrthoFxError, match=r"^there is no file .*part-1\.(bin|safetensors)$"):
            load_pretrained(tmp_path)


def test_a_file_takes_the_heads_from_the_config_beside_it_a_preset_or_the_width(tmp_path):
    (tmp_path / "alone").mkdir()
    torch.save(transformers_state(width=128), tmp_path / "alone" / "a.pt")
    loaded = load_pretrained(tmp_path / "alone" / "a.pt")
    assert loaded.model.config.heads == 2
    assert loaded.notes == ("the file does not tell its number of heads, which is taken to be 2, width / 64",)
    torch.save(GPT2(PRESETS["tiny"]).state_dict(), tmp_path / "alone" / "a.pt")
    loaded = load_pretrained(tmp_path / "alone" / "a.pt")
    assert loaded.model.config == PRESETS["tiny"]
    assert loaded.notes == ("the file does not tell its number of heads, which is taken to be 4, as in tiny",)
    path = folder(tmp_path / "folder", transformers_state()) / "pytorch_model.bin"
    assert load_pretrained(path).model.config.heads == 3
    (path.parent / "config.json").write_text(json.dumps({"architecture": "convnext_tiny"}))
    assert error_of(path) == (
        "HERE/pytorch_model.bin: the tensors do not tell the number of heads, and width 12 is no multiple of 64: put "
        "transformers' config.json beside them"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"activation_function": "gelu"},
            "config.json has activation_function 'gelu', and ortho-fx' GPT-2 has 'gelu_new'",
        ),
        ({"layer_norm_epsilon": 1e-6}, "config.json has layer_norm_epsilon 1e-06, and ortho-fx' GPT-2 has 1e-05"),
        ({"scale_attn_weights": False}, "config.json has scale_attn_weights False, and ortho-fx' GPT-2 has True"),
        ({"n_head": 5}, "config.json has n_embd 12 and n_head 5, which do not fit the tensors' width 12"),
        ({"n_embd": 24}, "config.json has n_embd 24 and n_head 3, which do not fit the tensors' width 12"),
    ],
)
def test_variants_of_gpt2_are_refused(tmp_path, settings, message):
    path = folder(tmp_path / "folder", transformers_state(), {**SETTINGS, **settings})
    assert error_of(path) == f"HERE/folder: {message}"


@pytest.mark.parametrize("layout", [TIMM, AUTHORS], ids=["timm", "authors"])
def test_convnext_of_timm_and_of_its_authors(tmp_path, layout):
    state = convnext_state(layout)
    weights, config = convert(state), ConvNeXtConfig(CHANNELS, CLASSES, PATCH, DEPTHS, WIDTHS)
    assert (weights.kind, weights.config, weights.expansions) == ("convnext", config, {})
    assert weights.state.keys() == ConvNeXt(config).state_dict().keys()
    torch.save({"model": state}, tmp_path / "weights.pth")
    loaded = load_pretrained(tmp_path / "weights.pth")
    assert (loaded.kind, loaded.notes, loaded.model.config) == ("convnext", (), config)
    close(loaded.model(IMAGES), convnext_logits(layout, state, IMAGES))


def test_linear_layers_of_timm_may_be_convolutions(tmp_path):
    state = convnext_state(TIMM)
    convolutions = {k: v[:, :, None, None] if ".mlp." in k and v.dim() == 2 else v for k, v in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in convolutions.items()}, tmp_path / "a.safetensors")
    close(load_pretrained(tmp_path / "a.safetensors").model(IMAGES), convnext_logits(TIMM, state, IMAGES))


TITLES = "ortho-fx' gpt2, ortho-fx' convnext, transformers' GPT-2, timm's ConvNeXt, the ConvNeXt of its authors"


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {**convnext_state(TIMM), "stages.0.blocks.0.mlp.grn.weight": torch.ones(24)},
            "not in timm's ConvNeXt: stages.0.blocks.0.mlp.grn.weight; variants of it are not supported",
        ),
        (
            {
                **transformers_state(),
                "transformer.h.0.ln_cross_attn.weight": torch.ones(WIDTH),
                "score.weight": torch.ones(1),
            },
            "not in transformers' GPT-2: h.0.ln_cross_attn.weight, score.weight; variants of it are not supported",
        ),
        (
            {**transformers_state(), "lm_head.weight": torch.ones(VOCABULARY, WIDTH)},
            "the head is not tied: it differs from the embedding of the tokens, which GPT-2 has for it",
        ),
        (
            without(convnext_state(TIMM), "stem.1.bias", "stages.1.blocks.1.gamma"),
            "the tensors do not fit this ConvNeXt: 2 missing (stages.0.1.bias, stages.1.3.scale)",
        ),
        (
            {**convnext_state(TIMM), "stages.1.blocks.0.conv_dw.weight": torch.ones(10, 1, 5, 5)},
            "the tensors do not fit this ConvNeXt: 1 of another shape "
            "(stages.1.2.depthwise.weight, (10, 1, 5, 5) and not (10, 1, 7, 7))",
        ),
        (without(convnext_state(AUTHORS), "head.weight"), "what becomes head.weight, of 2 dimensions, is missing"),
        (
            {**transformers_state(), "transformer.wpe.weight": torch.ones(8)},
            "what becomes positions.weight, of 2 dimensions, is of shape (8,)",
        ),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.ones(1)},
            f"names of no known layout (model.layers.0.mlp.up_proj.weight); known are {TITLES}",
        ),
        ({}, f"names of no known layout (none); known are {TITLES}"),
    ],
)
def test_what_is_in_no_layout_is_named(tmp_path, state, message):
    assert error_of(folder(tmp_path / "folder", state)) == f"HERE/folder: {message}"


def own(build, kind=None, **settings):
    torch.manual_seed(0)
    model = build().double()
    if kind is not None:
        inputs = TOKENS if isinstance(model, GPT2) else IMAGES
        rewrite_(model, config_of(kind, **settings), example_inputs=inputs)
    return model


def small_gpt2():
    return GPT2(GPT2Config(VOCABULARY, CONTEXT, LAYERS, 1, 64))


def small_convnext():
    return ConvNeXt(ConvNeXtConfig(CHANNELS, CLASSES, PATCH, DEPTHS, WIDTHS, layer_scale=1.0))


@pytest.mark.parametrize(("build", "inputs"), [(small_gpt2, TOKENS), (small_convnext, IMAGES)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"granularity": "channel"}, {"granularity": "group:4", "clamp": 3.0}])
def test_plain_state_dicts_of_ours_tell_their_expansions(tmp_path, build, inputs, kind, settings):
    model = own(build, kind, **settings)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded = load_pretrained(tmp_path / "a.pt").model
    ours = [module.config for module in model.modules() if isinstance(module, ExpansionActivation)]
    theirs = [module.config for module in loaded.modules() if isinstance(module, ExpansionActivation)]
    assert len(ours) == len(theirs) > 0
    assert [replace(config, clamp=None) for config in theirs] == [replace(config, clamp=None) for config in ours]
    assert [config.clamp is None for config in theirs] == [config.clamp is None for config in ours]
    assert torch.equal(loaded(inputs), model(inputs))


def test_a_plain_state_dict_tells_gated_mlps(tmp_path):
    model = GPT2(GPT2Config(11, 16, 1, 1, 64, gated=True))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded = load_pretrained(tmp_path / "a.pt").model
    assert loaded.config.gated
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_layers_of_the_model_are_no_expansions():
    assert expansions_of(own(small_gpt2).state_dict()) == {}
    assert expansions_of({"a.coefficients": torch.ones(4)}) == {}


@pytest.mark.parametrize(("build", "inputs"), [(small_gpt2, TOKENS), (small_convnext, IMAGES)])
def test_runs_and_files_of_ours_come_with_their_expansions(tmp_path, build, inputs):
    model = own(build, "fourier", granularity="channel")
    save_weights(model, tmp_path / "model.safetensors", {})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = load_pretrained(path)
        assert loaded.notes == ()
        assert torch.equal(loaded.model(inputs), model(inputs))


def test_a_run_without_weights_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert error_of(tmp_path / "run") == (
        "HERE/run has no model.safetensors: a run writes it at its end; this one has saved no checkpoint yet, so start "
        "it again"
    )


def test_a_head_for_other_classes_is_fresh(tmp_path):
    state = convnext_state(TIMM)
    torch.save(state, tmp_path / "a.pt")
    torch.manual_seed(1)
    loaded = load_pretrained(tmp_path / "a.pt", classes=4, channels=CHANNELS)
    assert loaded.notes == ("its head of 5 classes is replaced by a fresh one of 4",)
    assert loaded.model.config.classes == 4
    head = loaded.model.head
    assert (head.weight.shape, head.weight.dtype) == ((4, WIDTHS[-1]), torch.float64)
    assert 0.01 < head.weight.std() < 0.03
    assert not head.bias.any()
    torch.manual_seed(1)
    assert torch.equal(load_pretrained(tmp_path / "a.pt", classes=4).model.head.weight, head.weight)
    loaded.model.head = nn.Linear(WIDTHS[-1], CLASSES).double()
    loaded.model.head.load_state_dict({"weight": state["head.fc.weight"], "bias": state["head.fc.bias"]})
    close(loaded.model(IMAGES), convnext_logits(TIMM, state, IMAGES))
    same = load_pretrained(tmp_path / "a.pt", classes=CLASSES)
    assert same.notes == ()
    close(same.model(IMAGES), convnext_logits(TIMM, state, IMAGES))


def test_a_shorter_context_keeps_the_first_positions(tmp_path):
    state = transformers_state()
    path = folder(tmp_path / "folder", state)
    loaded = load_pretrained(path, context=6)
    assert loaded.notes == ("it keeps the first 6 of its 8 positions",)
    assert loaded.model.config.context == len(loaded.model.positions.weight) == 6
    close(loaded.model(TOKENS), transformers_logits(state, TOKENS, 3))
    assert load_pretrained(path, context=8).notes == ()


def test_settings_that_the_model_cannot_meet_are_named(tmp_path):
    gpt2, path = folder(tmp_path / "gpt2", transformers_state()), tmp_path / "a.pt"
    torch.save(convnext_state(TIMM), path)
    assert error_of(gpt2, context=9) == "HERE/gpt2: it knows 8 positions, and cannot take a context of 9 tokens"
    assert error_of(gpt2, context=0) == "HERE/gpt2: context must be 1 or more; got 0"
    assert error_of(gpt2, classes=9) == "HERE/gpt2: classes is a setting of convnext, and this is a gpt2"
    assert error_of(path, context=9) == "HERE/a.pt: context is a setting of gpt2, and this is a convnext"
    assert error_of(path, channels=1) == "HERE/a.pt: it takes images of 3 channels; the data have 1"


def test_what_a_model_trains_with_is_set(tmp_path):
    path = folder(tmp_path / "gpt2", transformers_state())
    assert load_pretrained(path).model.config.dropout == 0
    loaded = load_pretrained(path, dropout=0.25, drop_path=0.5).model
    assert loaded.config.dropout == loaded.dropout.p == loaded.blocks[1].attention.dropout == 0.25
    save_weights(ConvNeXt(replace(small_convnext().config, drop_path=0.2)), tmp_path / "a.safetensors", {})
    assert load_pretrained(tmp_path / "a.safetensors").model.stages[1][3].drop_path == 0.2
    assert load_pretrained(tmp_path / "a.safetensors", drop_path=0.5).model.stages[1][3].drop_path == 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path, dtype):
    state = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in transformers_state().items()}
    loaded = load_pretrained(folder(tmp_path / "folder", state))
    assert loaded.notes == (f"its weights in {dtype} are now in float32",)
    assert {tensor.dtype for tensor in loaded.model.state_dict().values()} == {torch.float32}
    model = own(small_convnext, "hermite").to(getattr(torch, dtype))
    save_weights(model, tmp_path / "model.safetensors", {})
    loaded = load_pretrained(tmp_path)
    assert {tensor.dtype for tensor in loaded.model.state_dict().values()} == {torch.float32}


def test_a_pretrained_model_is_rewritten_with_fits_of_its_gelu(tmp_path):
    state = convnext_state(AUTHORS)
    torch.save(state, tmp_path / "a.pt")
    model = load_pretrained(tmp_path / "a.pt").model
    report = rewrite_(model, ExpansionConfig("tropical_rational", 12, init="fit"), example_inputs=IMAGES)
    assert len(report.replaced) == sum(DEPTHS)
    logits = convnext_logits(AUTHORS, state, IMAGES)
    assert (model(IMAGES) - logits).std() < 0.05 * logits.std()
