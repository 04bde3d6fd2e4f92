import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import ortho_fx
from ortho_fx import (
    ExpansionConfig,
    OrthoFxError,
    expansion_config,
    freeze_,
    rewrite_,
    rewrite_like_,
    save_expansions,
)
from ortho_fx.bases import BASES

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def fresh(*, shared: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    act = nn.GELU()
    other = act if shared else nn.SiLU()
    return nn.Sequential(nn.Linear(8, 16), act, nn.Linear(16, 16), other, nn.Linear(16, 2))


def learned(model: nn.Module) -> nn.Module:
    """The model with other values in all its parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def mixed() -> nn.Module:
    model = fresh()
    rewrite_(model, {"1": ExpansionConfig("fourier", 5), "3": ExpansionConfig("hermite", 4, clamp=3.0)})
    return learned(model)


def in_a_file(model, folder, ending, kind):
    path = folder / f"source{ending}"
    if ending == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    elif ending == ".json":
        config = expansion_config(model)
        path.write_text(json.dumps(config if kind == "map" else {"expansions": config}))
    else:
        torch.save(model.state_dict() if kind == "state" else {"step": 3, "model": model.state_dict()}, path)
    return path


SOURCES = {
    "state dict": lambda model, _: model.state_dict(),
    "names and shapes": lambda model, _: dict(model.state_dict()),
    "of DDP": lambda model, _: {f"module.{key}": value for key, value in model.state_dict().items()},
    "compiled": lambda model, _: torch.compile(model).state_dict(),
    "map": lambda model, _: expansion_config(model),
    "model": lambda model, _: model,
    "safetensors": lambda model, folder: in_a_file(model, folder, ".safetensors", "state"),
    "pt": lambda model, folder: str(in_a_file(model, folder, ".pt", "state")),
    "checkpoint": lambda model, folder: in_a_file(model, folder, ".pt", "checkpoint"),
    "json": lambda model, folder: in_a_file(model, folder, ".json", "map"),
    "config.json": lambda model, folder: in_a_file(model, folder, ".json", "nested"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_fresh_model_becomes_an_exact_copy(source, tmp_path):
    model, again = mixed(), fresh()
    report = rewrite_like_(again, SOURCES[source](model, tmp_path))
    assert [site.expansion for site in report.sites] == ["fourier 5", "hermite 4 clamp 3"]
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)
    assert expansion_config(again) == expansion_config(model)


def test_a_second_time_changes_nothing():
    model, again = mixed(), fresh()
    rewrite_like_(again, model)
    before = list(again.children())
    report = rewrite_like_(again, model)
    assert list(again.children()) == before
    assert not report.replaced
    assert "the model already held 2 expansions" in str(report)


def test_values_of_the_source_are_loaded_and_others_stay():
    model, again = mixed(), fresh()
    rewrite_like_(again, model.state_dict())
    torch.testing.assert_close(again[1].coefficients, model[1].coefficients, rtol=0, atol=0)
    torch.testing.assert_close(again[0].weight, fresh()[0].weight, rtol=0, atol=0)


def test_what_the_other_model_kept_is_left():
    model, again = fresh(), fresh()
    rewrite_(model, {"3": "hermite"})
    assert [site.name for site in rewrite_like_(again, model).left] == ["1"]
    assert isinstance(again[1], nn.GELU)


def test_gates_that_were_named_and_init_fit():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    again = copy.deepcopy(model)
    rewrite_(model, ExpansionConfig("fourier", 7, "fit"), targets="sigmoid")
    rewrite_like_(again, expansion_config(model))  # no values: the function is fitted as it was
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["state dict", "map", "model", "names and shapes"])
@pytest.mark.parametrize("granularity", ["channel", "group:4"])
def test_channels(granularity, source, tmp_path):
    model, again = fresh(), fresh()
    rewrite_(model, ExpansionConfig("fourier", 3, granularity=granularity), example_inputs=X)
    learned(model)
    told = SOURCES[source](model, tmp_path)
    if source == "names and shapes":
        with pytest.raises(OrthoFxError, match=r"^1, 3: the tensors do not tell the number and the dimension of the"):
            rewrite_like_(again, told)
        rewrite_like_(again, told, example_inputs=X)
    else:
        rewrite_like_(again, told)
        assert expansion_config(again) == expansion_config(model)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("sharing", ["instance", "site"])
@pytest.mark.parametrize("source", ["state dict", "map", "model", "names and shapes"])
def test_what_is_shared_stays_shared(source, sharing, tmp_path):
    model, again = fresh(shared=True), fresh(shared=True)
    rewrite_(model, "hermite", sharing=sharing)
    learned(model)
    rewrite_like_(again, SOURCES[source](model, tmp_path))
    again.load_state_dict(model.state_dict())
    assert (again[1] is again[3]) == (sharing == "instance")
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["state dict", "map", "model"])
def test_frozen_expansions(source, tmp_path):
    model, again = mixed(), fresh()
    freeze_(model)
    told = SOURCES[source](model, tmp_path)
    rewrite_like_(again, told)
    if source == "map":  # which has no values: NaN until the state dict is loaded
        assert again(X).isnan().all()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)
    assert expansion_config(again) == expansion_config(model)


def test_a_prefix_more_or_less():
    model, inside = mixed(), nn.ModuleDict({"model": fresh()})
    rewrite_like_(inside, model)
    assert sorted(expansion_config(inside)["sites"]) == ["model.1", "model.3"]
    again = fresh()
    rewrite_like_(again, inside.state_dict())
    torch.testing.assert_close(again[1].coefficients, model[1].coefficients, rtol=0, atol=0)


def test_the_meta_device():
    model, again = mixed(), fresh().to("meta")
    rewrite_like_(again, model.state_dict())
    again.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)


def test_calibrated_expansions_without_values_say_so():
    model, again = fresh(), fresh()
    rewrite_(model, ExpansionConfig(init="calibrated"), example_inputs=X)
    report = rewrite_like_(again, expansion_config(model))
    assert report.notes == (
        "2 expansions with init 'calibrated' start 'stable', for the state dict to fill: without one, pass "
        "example_inputs or call calibrate_",
    )
    other = fresh()
    assert rewrite_like_(other, expansion_config(model), example_inputs=X).notes == ()
    torch.testing.assert_close(other(X), model(X))


def test_a_preset_that_is_not_here_is_not_needed(tmp_path):
    model, again, file = fresh(), fresh(), tmp_path / "mine.json"
    file.write_bytes((Path(ortho_fx.__file__).parent / "presets" / "gpt2-small.json").read_bytes())
    rewrite_(model, ExpansionConfig("fourier", 1, init=f"preset:{file}"))
    described = expansion_config(model)
    assert rewrite_like_(fresh(), described).notes == ()
    file.unlink()
    (note,) = rewrite_like_(again, described).notes
    assert note == (
        f"expansions with init preset:{file} start 'stable', for the state dict to fill: there is no such file here"
    )
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)
    rewrite_like_(other := fresh(), model)
    torch.testing.assert_close(other[1].coefficients, model[1].coefficients, rtol=0, atol=0)


def test_a_file_of_expansions_alone(tmp_path):
    pytest.importorskip("safetensors")
    model, again = mixed(), fresh()
    file = save_expansions(model, tmp_path / "expansions.safetensors")
    assert (file.expansions, file.numbers) == (2, 16 + 5 + 2)
    assert file.bytes == file.path.stat().st_size < 2048
    assert str(file) == f"{file.path}: 2 expansions, 23 numbers, {file.bytes / 1024:.1f} KB"
    rewrite_like_(again, file.path)
    assert expansion_config(again) == expansion_config(model)
    torch.testing.assert_close(again[3].bounds, model[3].bounds, rtol=0, atol=0)
    inside = nn.Sequential(torch.compile(mixed()))
    assert save_expansions(inside, file.path).numbers == file.numbers
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(OrthoFxError, match=r"expansions\.safetensors is damaged: its content has changed"):
        rewrite_like_(fresh(), file.path)
    with pytest.raises(OrthoFxError, match=r"must end in \.safetensors$"):
        save_expansions(model, tmp_path / "expansions.pt")
    with pytest.raises(OrthoFxError, match=r"^Sequential holds no expansion to save: call rewrite_ first$"):
        save_expansions(fresh(), file.path)


@pytest.mark.parametrize("sorted_keys", [False, True])
def test_frozen_expansions_in_files(tmp_path, sorted_keys):
    """The order of their constants counts, and JSON is often written with sorted keys."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = mixed()
    freeze_(model)
    save_expansions(model, tmp_path / "expansions.safetensors")
    (tmp_path / "folder").mkdir()
    safetensors.save_file(model.state_dict(), tmp_path / "folder" / "model.safetensors")
    (tmp_path / "folder" / "config.json").write_text(
        json.dumps({"expansions": expansion_config(model)}, sort_keys=sorted_keys)
    )
    for name in ("expansions.safetensors", "folder"):
        again = fresh()
        rewrite_like_(again, tmp_path / name)
        assert repr(again) == repr(model)
        torch.testing.assert_close(again(X), learned_elsewhere(model, again)(X), rtol=0, atol=0)


def learned_elsewhere(model: nn.Module, like: nn.Module) -> nn.Module:
    """The model with the layers of another one, and its own expansions."""
    other = copy.deepcopy(model)
    other.load_state_dict({k: v for k, v in like.state_dict().items() if k[0] in "024"}, strict=False)
    return other


def test_a_shared_expansion_on_the_meta_device():
    model = fresh(shared=True)
    rewrite_(model, "hermite3")
    assert [name for name in model.to("meta").state_dict() if "coef" in name] == ["1.coefficients", "3.coefficients"]


def changed(**values):
    config = expansion_config(mixed())
    config["sites"]["1"] |= values
    return config


def replaced_otherwise() -> nn.Module:
    model = fresh()
    rewrite_(model, "tropical")
    return model


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        (fresh(), 3, "source must be a map of expansion_config, a state dict, the path of a file, or a model; got int"),
        (fresh(), {}, "it holds no expansions: rewrite_ makes them"),
        (fresh(), fresh(), "it holds no expansions: rewrite_ makes them"),
        (fresh()[:2], mixed(), "the model has no activation at 3; the model's sites are 1"),
        (
            replaced_otherwise(),
            mixed(),
            "1 holds tropical 5 already, and the source has fourier 5: call revert_ first",
        ),
        (
            fresh(),
            expansion_config(mixed()) | {"version": 2},
            "the configuration of expansions has version 2; this release reads version 1: update ortho_fx",
        ),
        (fresh(), changed(version=2), "1: expansion config has version 2; this release reads version 1"),
        (
            fresh(),
            changed(basis="bessel"),
            f"1: basis must be one of {', '.join(BASES)}; got 'bessel'",
        ),
        (
            fresh(),
            expansion_config(mixed()) | {"shared": {"3": "2"}},
            "shared names expansions that are not among the sites: 3: 2",
        ),
        (
            fresh(),
            expansion_config(fresh()) | {"sites": {"1": {}, "3": {}}, "shared": {"3": "1"}},
            "the model has two activations at 1 and 3, and the source one expansion; the model's sites are 1, 3",
        ),
        (fresh(), {"a": {"b": 1}}, "the map is neither that of expansion_config nor a state dict: a is a dict"),
    ],
)
def test_mistakes_are_named_and_change_nothing(model, source, message):
    before = list(model.children())
    with pytest.raises(OrthoFxError) as caught:
        rewrite_like_(model, source)
    assert str(caught.value) == message
    assert list(model.children()) == before


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(basis="bessel")))
    with pytest.raises(OrthoFxError, match=f"^{path}: 1: basis must be one of hermite"):
        rewrite_like_(fresh(), path)
    path.write_text("{")
    with pytest.raises(OrthoFxError, match=f"^{path}: cannot read"):
        rewrite_like_(fresh(), path)


def test_tensors_that_do_not_fit_leave_the_model_as_it_was():
    state = mixed().state_dict()
    state["3.bounds"] = torch.zeros(3)
    model = fresh()
    with pytest.raises(OrthoFxError, match=r"^3: the source's tensors do not fit: size mismatch for bounds"):
        rewrite_like_(model, state)
    assert isinstance(model[1], nn.GELU)
    assert isinstance(model[3], nn.SiLU)


def test_json_with_sorted_keys_describes_the_same_frozen_expansions():
    model = fresh()
    rewrite_(model, "fourier1")
    freeze_(learned(model))
    again = fresh()
    rewrite_like_(again, json.loads(json.dumps(expansion_config(model), sort_keys=True)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), model(X))
