"""Files of expansions: an expansion of any kind computes the same after it is read."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from ortho_fx import ExpansionConfig, OrthoFxError, files
from ortho_fx.activations.expansion import make_activation
from ortho_fx.models.weights.expansions import SiteInputs, load_expansions, write_expansions
from ortho_fx.passes.vocabulary.targets import Reference
from tests.kinds import KINDS, config_of

INPUTS = SiteInputs(0.5, 1.5, -3.0, math.nan, (1, 2, 3), (-1.0, 2.0), 6)


def write(path, activations, inputs=None):
    tensors = {name: {k: v.clone() for k, v in site.state_dict().items()} for name, site in activations.items()}
    write_expansions(path, 12, activations, tensors, inputs or {})


@pytest.mark.parametrize("granularity", ["layer", "channel", "group:2"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path, kind, granularity):
    config = config_of(kind, granularity=granularity, clamp=2.0)
    settings = {} if granularity == "layer" else {"channels": 4, "channel_dim": -1}
    activation = make_activation(config, reference=Reference("gelu", (("approximate", "tanh"),)), **settings)
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write(tmp_path / "e.safetensors", {"a.b": activation, "a": activation}, {"a": INPUTS})
    saved = load_expansions(tmp_path / "e.safetensors")
    assert saved.step == 12
    assert list(saved.sites) == ["a.b", "a"]
    x = torch.linspace(-3, 3, 20).reshape(5, 4)
    for site in saved.sites.values():
        assert torch.equal(site.activation(x), activation(x))
        assert site.activation.config == config
        assert site.activation.reference == activation.reference
    assert saved.sites["a.b"].inputs is None
    inputs = saved.sites["a"].inputs
    assert math.isnan(inputs.high)
    assert (inputs.mean, inputs.counts, inputs.interval) == (0.5, (1, 2, 3), (-1.0, 2.0))
    assert inputs.edges.tolist() == [-1, 0, 1, 2]
    assert inputs.density.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_a_fitted_expansion_is_read_without_fitting_it_again(tmp_path):
    activation = make_activation(ExpansionConfig("hermite", 5, init="fit"), reference=torch.sin)
    write(tmp_path / "e.safetensors", {"a": activation})
    loaded = load_expansions(tmp_path / "e.safetensors").sites["a"].activation
    assert torch.equal(loaded.coefficients, activation.coefficients)
    assert loaded.config.init == "fit"
    assert loaded.reference is None  # the function has no name by which to find it


def test_a_file_cannot_have_a_formula_evaluated(tmp_path):
    activation = make_activation(ExpansionConfig(), reference=Reference("self_gated", (("formula", "1 / 0"),)))
    write(tmp_path / "e.safetensors", {"a": activation})
    assert load_expansions(tmp_path / "e.safetensors").sites["a"].activation.reference is None


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "e.safetensors"
    write(path, {"a": make_activation(ExpansionConfig())})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OrthoFxError, match=r"e\.safetensors: No space left on device"):
        write(path, {"b": make_activation(ExpansionConfig())})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["e.safetensors"]


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "e.safetensors"
    write(path, {"a": make_activation(ExpansionConfig())}, {"a": INPUTS})
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b'"step":"12"', b'"step":"13"')):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(OrthoFxError, match=r"e\.safetensors is damaged: its content has changed"):
            load_expansions(path)


def test_files_of_something_else_are_named(tmp_path):
    path = tmp_path / "e.safetensors"
    with pytest.raises(OrthoFxError, match=r"e\.safetensors"):
        load_expansions(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(OrthoFxError, match=r"e\.safetensors is not a readable"):
        load_expansions(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(OrthoFxError, match="is not a file of expansions: its format is None"):
        load_expansions(path)
    described = {"format": "ortho_fx expansions", "version": "1", "step": "3"}
    save_file({"w": torch.ones(2)}, path, {**described, "version": "2"})
    with pytest.raises(OrthoFxError, match="has version 2; this release reads version 1"):
        load_expansions(path)
    save_file({"w": torch.ones(2)}, path, {**described, "sites": json.dumps({"a": {"config": {"basis": "bessel"}}})})
    with pytest.raises(OrthoFxError, match=r"e\.safetensors: basis must be one of"):
        load_expansions(path)
    save_file({"w": torch.ones(2)}, path, {**described, "sites": json.dumps({"a": {"config": {}}})})
    with pytest.raises(OrthoFxError, match="does not describe its expansions: 'channels'"):
        load_expansions(path)
