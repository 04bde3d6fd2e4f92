"""Weights are loaded as the model that was saved, and errors say why a file does not fit."""

import copy
import errno
import json
import os
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from ortho_fx import (
    ExpansionActivation,
    ExpansionConfig,
    FrozenExpansion,
    OrthoFxError,
    files,
    freeze_,
    revert_,
    rewrite_,
)
from ortho_fx.models.convnext import PRESETS as CONVNEXTS
from ortho_fx.models.convnext import ConvNeXt, ConvNeXtConfig
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.models.weights.bundle import load_model, load_weights, read_weights, save_weights
from tests.kinds import KINDS, config_of

pytestmark = pytest.mark.slow

SMALL_GPT2 = GPT2Config(vocabulary=32, context=8, layers=2, heads=2, width=16)
SMALL_CONVNEXT = ConvNeXtConfig(1, 5, 2, (1, 2), (8, 16), layer_scale=1.0)
TOKENS = torch.arange(16).reshape(2, 8)
IMAGES = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)


def gpt2(config=SMALL_GPT2):
    torch.manual_seed(0)
    return GPT2(config)


def convnext(config=SMALL_CONVNEXT):
    torch.manual_seed(0)
    return ConvNeXt(config)


def inputs_of(model):
    return TOKENS if isinstance(model, GPT2) else IMAGES


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def expansions(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpansionActivation)}


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("build", [gpt2, convnext])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"granularity": "channel"}, {"granularity": "group:8", "clamp": 3.0}])
def test_a_rewritten_model_comes_back(tmp_path, build, kind, settings):
    model = build()
    rewrite_(model, config_of(kind, init="fit", **settings), example_inputs=inputs_of(model))
    perturbed(model)
    save_weights(model, tmp_path / "model.safetensors", {"step": 7})
    loaded = load_model(tmp_path / "model.safetensors")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(loaded(inputs_of(model)), model(inputs_of(model)))
    assert [*expansions(loaded)] == [*expansions(model)]
    for name, expansion in expansions(loaded).items():
        assert expansion.config == expansions(model)[name].config
        assert expansion.channels == expansions(model)[name].channels
        assert expansion.channel_dim == (-1 if settings else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"clamp": 3.0}, {"granularity": "group:8"}])
def test_a_frozen_model_comes_back(tmp_path, kind, settings):
    model = gpt2()
    rewrite_(model, config_of(kind, **settings), example_inputs=TOKENS)
    freeze_(perturbed(model))
    save_weights(model, tmp_path / "model.safetensors", {})
    loaded = load_model(tmp_path / "model.safetensors")
    sites = [module.site_config() for module in model.modules() if isinstance(module, FrozenExpansion)]
    assert [module.site_config() for module in loaded.modules() if isinstance(module, FrozenExpansion)] == sites
    assert len(sites) == 2
    assert not expansions(loaded)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    load_weights(perturbed(loaded), tmp_path / "model.safetensors")
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("build", [gpt2, convnext])
def test_a_model_that_comes_back_trains_and_is_reverted(tmp_path, build):
    model = build()
    rewrite_(model, ExpansionConfig("tropical"))
    save_weights(model, tmp_path / "file", {})
    loaded = load_model(tmp_path / "file")
    assert loaded.training
    loaded(inputs_of(model)).square().mean().backward()
    assert all(p.requires_grad and p.grad is not None for p in loaded.parameters())
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    revert_(loaded)
    assert torch.allclose(loaded(inputs_of(model)), build()(inputs_of(model)))


def test_sites_may_differ(tmp_path):
    model = gpt2()
    configs = {"blocks.0.*": ExpansionConfig("fourier", 4, tied=True), "blocks.1.*": None}
    rewrite_(model, configs)
    save_weights(perturbed(model), tmp_path / "file", {})
    loaded = load_model(tmp_path / "file")
    assert {name: module.config for name, module in expansions(loaded).items()} == {
        "blocks.0.mlp.act": configs["blocks.0.*"]
    }
    assert isinstance(loaded.blocks[1].mlp.act, nn.GELU)
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model = gpt2()
    state = model.state_dict()
    for given in (None, {name: tensor.clone() for name, tensor in state.items()}, {**state}):
        if given is not None and given["head.weight"] is state["head.weight"]:
            del given["head.weight"]
        save_weights(model, tmp_path / "file", {}, given)
        assert load_file(tmp_path / "file").keys() == state.keys() - {"head.weight"}
        loaded = load_model(tmp_path / "file")
        assert loaded.head.weight is loaded.tokens.weight
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    with pytest.raises(OrthoFxError, match=r"^head\.weight differs from tokens\.weight, and a GPT2 has one for both$"):
        save_weights(model, tmp_path / "file", {}, {**state, "head.weight": state["head.weight"] + 1})


def test_the_file_describes_its_model(tmp_path):
    model = convnext(CONVNEXTS["tiny"])
    rewrite_(
        model, {"stages.0.*": ExpansionConfig(granularity="channel"), "*": ExpansionConfig()}, example_inputs=IMAGES
    )
    save_weights(model, tmp_path / "file", {"data": "digits", "steps": 3})
    assert metadata(tmp_path / "file").keys() == {"format", "ortho_fx", "ortho_fx.sha256"}
    assert metadata(tmp_path / "file")["format"] == "pt"
    values = json.loads(metadata(tmp_path / "file")["ortho_fx"])
    sites = expansions(model)
    assert values == {
        "version": 1,
        "model": "convnext",
        "size": "tiny",
        "config": json.loads(json.dumps(asdict(CONVNEXTS["tiny"]))),
        "expansions": {name: module.config.to_dict() for name, module in sites.items()},
        "channels": {name: [192, -1] for name in sites if name.startswith("stages.0")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "description": {"data": "digits", "steps": 3},
    }
    assert read_weights(tmp_path / "file").description == values["description"]


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(GPT2(SMALL_GPT2), path, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for load in (load_model, lambda path: load_weights(GPT2(SMALL_GPT2), path)):
        with pytest.raises(OrthoFxError, match=r"model\.safetensors is damaged: its content has changed"):
            load(path)


def test_size_is_the_preset_of_that_shape(tmp_path):
    for config, size in ((replace(CONVNEXTS["tiny"], drop_path=0.3), "tiny"), (SMALL_CONVNEXT, None)):
        save_weights(ConvNeXt(config), tmp_path / "file", {})
        assert json.loads(metadata(tmp_path / "file")["ortho_fx"])["size"] == size
        assert load_model(tmp_path / "file").config == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(tmp_path, dtype):
    model = gpt2()
    rewrite_(model, ExpansionConfig())
    save_weights(model.to(dtype), tmp_path / "file", {})
    assert {tensor.dtype for tensor in load_model(tmp_path / "file").state_dict().values()} == {dtype}


def test_a_state_is_saved_in_the_place_of_the_models_own(tmp_path):
    model = gpt2()
    average = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    average["positions.weight"] = average["positions.weight"].t().contiguous().t()
    assert not average["positions.weight"].is_contiguous()
    save_weights(model, tmp_path / "file", {}, average)
    loaded = load_model(tmp_path / "file").state_dict()
    assert all(torch.equal(loaded[name], average[name]) for name in average)


def test_weights_are_loaded_into_an_existing_model(tmp_path):
    model = gpt2(replace(SMALL_GPT2, dropout=0.2))
    rewrite_(model, ExpansionConfig())
    save_weights(perturbed(model), tmp_path / "file", {})
    other = GPT2(SMALL_GPT2)
    rewrite_(other, ExpansionConfig(init="fit"))
    head = other.head.weight
    load_weights(other, tmp_path / "file")
    assert other.head.weight is other.tokens.weight is head
    assert torch.equal(other.eval()(TOKENS), model.eval()(TOKENS))


def test_weights_of_another_model_are_refused(tmp_path):
    def error(model):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(OrthoFxError) as caught:
            load_weights(model, tmp_path / "file")
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        return str(caught.value).replace(str(tmp_path), "HERE")

    model = gpt2()
    rewrite_(model, ExpansionConfig("fourier", 3))
    save_weights(model, tmp_path / "file", {})
    assert error(convnext()) == "HERE/file is of another model: model is 'gpt2' there and 'convnext' here"
    assert error(gpt2(replace(SMALL_GPT2, heads=4, context=16))) == (
        "HERE/file is of another model: context is 8 there and 16 here, heads is 2 there and 4 here"
    )
    assert error(gpt2()) == (
        "HERE/file: the tensors do not fit this GPT2: 8 surplus (blocks.0.mlp.act.coefficients, "
        "blocks.0.mlp.act.constant, blocks.0.mlp.act.frequencies, ...)"
    )
    for degree, told in ((4, "(3,) and not (4,)"), (2, "(3,) and not (2,)")):
        other = gpt2()
        rewrite_(other, ExpansionConfig("fourier", degree))
        assert error(other).startswith(
            "HERE/file: the tensors do not fit this GPT2: 6 of another shape (blocks.0.mlp.act.coefficients, " + told
        )
    other = gpt2()
    rewrite_(other, ExpansionConfig("hermite", 2))
    assert error(other) == (
        "HERE/file: the tensors do not fit this GPT2: 6 surplus (blocks.0.mlp.act.constant, "
        "blocks.0.mlp.act.frequencies, blocks.0.mlp.act.phases, ...)"
    )


def written(path, tensors, **changes):
    """Writes the file of a small GPT-2 with changes to its description; None removes a field."""
    save_weights(gpt2(), path, {})
    values = json.loads(metadata(path)["ortho_fx"]) | changes
    text = json.dumps({key: value for key, value in values.items() if value is not None})
    save_file(load_file(path) | tensors, path, {"ortho_fx": text})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "it has version 2 of weights; this release reads version 1"),
        ({"version": None}, "its metadata are damaged: KeyError, 'version'"),
        ({"model": "bert"}, "its metadata are damaged: KeyError, 'bert'"),
        ({"config": {"rooms": 3}}, r"its metadata are damaged: TypeError, .*unexpected keyword argument 'rooms'"),
        ({"expansions": {"blocks.0.mlp.act": {"basis": "bessel"}}}, "basis must be one of"),
        (
            {"expansions": {"blocks.7.mlp.act": {}}},
            r"blocks\.7\.mlp\.act is no activation of this GPT2; those are blocks\.0\.mlp\.act, blocks\.1\.mlp\.act$",
        ),
        (
            {"expansions": {"blocks.1.mlp.act": {"basis": "hermite"}}},
            r"the tensors do not fit this GPT2: 1 missing \(blocks\.1\.mlp\.act\.coefficients\)$",
        ),
        (
            {"config": {**asdict(SMALL_GPT2), "layers": 1, "vocabulary": 33}},
            r"12 surplus \(blocks\.1\..*, \.\.\.\); 1 of another shape \(tokens\.weight, \(32, 16\) and not \(33, 16\)",
        ),
    ],
)
def test_a_description_that_does_not_fit_is_named(tmp_path, changes, message):
    written(tmp_path / "file", {}, **changes)
    with pytest.raises(OrthoFxError, match=f"^{tmp_path}/file: .*{message}"):
        load_model(tmp_path / "file")


def test_surplus_tensors_are_named(tmp_path):
    written(tmp_path / "file", {"a": torch.ones(1)})
    with pytest.raises(OrthoFxError, match=r"the tensors do not fit this GPT2: 1 surplus \(a\)$"):
        load_model(tmp_path / "file")


def test_files_that_are_not_ours_are_named(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OrthoFxError, match=f"^there is no file {path}$"):
        load_model(path)
    path.write_bytes(b"no weights at all")
    with pytest.raises(OrthoFxError, match=f"^{path} is not a readable safetensors file: "):
        load_model(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(OrthoFxError, match=f"^{path}: its metadata have no ortho_fx, which says what model it is of"):
        load_model(path)
    save_file({"a": torch.ones(1)}, path, {"ortho_fx": "{"})
    with pytest.raises(OrthoFxError, match=f"^{path}: its metadata are damaged: JSONDecodeError, "):
        load_model(path)


def test_what_cannot_be_saved_is_named(tmp_path):
    def error(model, description=None, state=None):
        with pytest.raises(OrthoFxError) as caught:
            save_weights(model, tmp_path / "file", description or {}, state)
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    assert error(nn.Linear(2, 2)) == "the model must be a GPT2 or a ConvNeXt; got Linear"
    assert error(nn.Sequential(gpt2())) == "the model must be a GPT2 or a ConvNeXt; got Sequential"
    assert error(gpt2(), {"path": tmp_path}).startswith(
        "the description of the weights must be plain values for JSON: "
    )
    assert error(gpt2(), {}, {"module.norm.weight": torch.ones(16)}).startswith(
        "the tensors do not fit this GPT2: 28 missing (tokens.weight, positions.weight, blocks.0.norm1.weight, ...); "
        "1 surplus (module.norm.weight)"
    )


def test_sharded_parameters_are_refused(tmp_path):
    state = gpt2().state_dict()
    state["norm.weight"] = nn.Parameter(state["norm.weight"])
    state["norm.weight"].device_mesh = "a DTensor's"
    with pytest.raises(OrthoFxError, match=r"^norm\.weight is sharded over processes: gather the full state dict"):
        save_weights(gpt2(), tmp_path / "file", {}, state)


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_for_safetensors(*_):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [_full, _full_for_safetensors])
def test_a_full_disk_keeps_the_earlier_weights(tmp_path, monkeypatch, failure):
    path = tmp_path / "model.safetensors"
    save_weights(gpt2(), path, {"step": 1})
    if failure is _full:
        monkeypatch.setattr(files.os, "fsync", failure)
    else:
        monkeypatch.setattr("safetensors.torch.save_file", failure)
    with pytest.raises(OrthoFxError) as caught:
        save_weights(gpt2(), path, {"step": 2})
    assert str(caught.value) == f"cannot save {path}: No space left on device; an earlier file there is untouched"
    monkeypatch.undo()
    assert read_weights(path).description == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (gpt2, {"layers": 10**7}, r"layers are more than its \d+ tensors"),
        (gpt2, {"layers": True}, "layers must be a whole number from 1 to 2147483647; got True"),
        (gpt2, {"width": 10**30}, "width must be a whole number from 1 to"),
        (gpt2, {"heads": 7}, "is no multiple of the 7 heads"),
        (gpt2, {"dropout": float("inf")}, "dropout must be a finite number; got inf"),
        (convnext, {"widths": [-4, 96]}, "widths must be a whole number from 1 to 2147483647; got -4"),
        (convnext, {"depths": [1.5, 2]}, "depths must be a whole number from 1 to 2147483647; got 1.5"),
        (convnext, {"depths": []}, "depths is"),
        (convnext, {"depths": [1]}, "depths .* and widths .* differ"),
        (convnext, {"classes": True}, "classes must be a whole number"),
    ],
)
def test_a_config_out_of_range_is_refused_before_the_model_is_made(tmp_path, monkeypatch, build, changes, message):
    model, path = build(), tmp_path / "model.safetensors"
    save_weights(model, path, {})
    values = json.loads(metadata(path)["ortho_fx"])
    values["config"] |= changes
    save_file(load_file(path), path, {"format": "pt", "ortho_fx": json.dumps(values)})
    monkeypatch.setattr(type(model), "__init__", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(OrthoFxError, match=f"its metadata are damaged: .*{message}"):
        load_model(path)
