"""Harvest: the mean of what was learned, pruned with a stated error, and a start for others, live or frozen."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, OrthoFxError, calibrate_, expansion_config, freeze_, gains, rewrite_
from ortho_fx.activations.expansion import make_activation
from ortho_fx.cli import main
from ortho_fx.models import gpt2
from ortho_fx.models.runs.harvest import harvest
from ortho_fx.models.weights.expansions import SiteInputs, write_expansions
from ortho_fx.numerics.preset import presets, read_preset
from tests.h100 import triton_code

SINE = {"constant": [0.2], "coefficients": [1.5], "frequencies": [0.7], "phases": [math.pi / 2]}


def a_run(folder, values, config=None, inputs=((0.0, 1.0),), grown=1.0, **settings):
    """A run whose sites have these functions in standard units, of inputs with these means and deviations at the start.

    At the end their deviations are `grown` times as large.
    """
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    config = config or ExpansionConfig("fourier", len(values["phases"]))
    activations, start, now = {}, {}, {}
    for number, (mean, std) in enumerate(inputs):
        activation = make_activation(config, dtype=torch.float64, **settings)
        standard = {name: torch.tensor(value, dtype=torch.float64).numpy() for name, value in values.items()}
        activation.set_parameters(activation.basis.rescale(standard, mean, std))
        activations[f"layer{number}"], start[f"layer{number}"] = activation, SiteInputs(mean, std, mean, mean)
        now[f"layer{number}"] = SiteInputs(mean, std * grown, mean, mean)
    tensors = {name: activation.state_dict() for name, activation in activations.items()}
    for name, step, seen in (("expansions-start", 0, start), ("expansions", 5, now)):
        write_expansions(folder / f"{name}.safetensors", step, activations, tensors, seen)
    return folder


def close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tolist() == pytest.approx(list(second[name]), abs=1e-4)


def test_functions_are_averaged_in_standard_units(tmp_path):
    run = a_run(tmp_path / "a", SINE, inputs=((0.0, 1.0), (3.0, 0.2), (-1.0, 5.0)))
    preset = harvest([run])
    assert preset.functions == 3
    assert preset.rmse < 1e-6
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    c = {name: torch.from_numpy(value) for name, value in preset.parameters.items()}
    y = c["constant"] + c["coefficients"] * torch.cos(c["frequencies"] * z - c["phases"])
    torch.testing.assert_close(y, 0.2 + 1.5 * torch.sin(0.7 * z), rtol=0, atol=1e-5)


def test_runs_are_averaged_and_hermite_exactly(tmp_path):
    config = ExpansionConfig("hermite", 2, granularity="channel")
    runs = [
        a_run(tmp_path / name, {"coefficients": values}, config, channels=3, channel_dim=-1)
        for name, values in (("a", [0.0, 1.0, 0.5]), ("b", [1.0, 0.0, -0.5]))
    ]
    preset = harvest(runs)
    assert preset.parameters["coefficients"].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-9)
    assert preset.expansion == ExpansionConfig("hermite", 2)


def test_terms_that_vanish_are_pruned_with_a_stated_error(tmp_path):
    small = [1e-4, 0.0, 0.0, 0.0]
    values = {
        "constant": SINE["constant"],
        "coefficients": SINE["coefficients"] + small,
        "frequencies": [0.7, 1.4, 2.1, 2.8, 3.5],
        "phases": [math.pi / 2] * 5,
    }
    run = a_run(tmp_path / "a", values)
    assert harvest([run]).expansion.degree == 5
    pruned = harvest([run], error=1e-3)
    assert pruned.expansion.degree == 1
    assert pruned.rmse <= 1e-3
    hermite = a_run(
        tmp_path / "b", {"coefficients": [0.0, 1.0, 0.5]}, ExpansionConfig("hermite", 2), inputs=((0, 1), (0, 1))
    )
    with pytest.raises(OrthoFxError, match="hermite expansion up to degree 2 is within 1e-30 of the mean of 2 functio"):
        harvest([hermite], error=1e-30)


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "sine.json"
    harvest([a_run(tmp_path / "run", SINE)]).write(path)
    return path


def test_an_expansion_starts_from_a_preset_and_is_calibrated(preset):
    config = ExpansionConfig("fourier", 1, init=f"preset:{preset}")
    model = nn.Sequential(nn.GELU())
    rewrite_(model, config)
    z = torch.linspace(-2, 2, 21)
    torch.testing.assert_close(model(z), 0.2 + 1.5 * torch.sin(0.7 * z), rtol=0, atol=1e-4)
    assert gains(config).forward == pytest.approx(gains(model[0]).forward, rel=1e-5)
    x = 3 + 0.5 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    calibrate_(model, [x])
    expected = x.std() * (0.2 + 1.5 * torch.sin(0.7 * (x - x.mean()) / x.std()))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-3)
    assert expansion_config(model)["sites"]["0"]["init"] == f"preset:{preset}"


def test_a_granularity_other_than_that_of_the_preset_is_refused_with_the_other_settings(preset):
    for settings, name in (
        ({"basis": "hermite", "degree": 1}, "basis"),
        ({"degree": 2}, "degree"),
        ({"degree": 1, "granularity": "group:2"}, "granularity"),
        ({"degree": 1, "gated": True}, "gated"),
        ({"degree": 1, "tied": True}, "tied"),
    ):
        config = ExpansionConfig(**{"basis": "fourier", **settings}, init=f"preset:{preset}")
        with pytest.raises(OrthoFxError, match=rf"sine.json has {name} .* and the expansion that .*: set {name}="):
            make_activation(config, channels=4)
    model = nn.Sequential(nn.GELU())
    with pytest.raises(OrthoFxError, match=r"^0: the preset .* has degree 1, and"):
        rewrite_(model, ExpansionConfig("fourier", 2, init=f"preset:{preset}"))
    assert type(model[0]) is nn.GELU


def test_damaged_presets_are_named(preset, tmp_path):
    values = json.loads(preset.read_text())
    for changes, message in (
        ({"format": "other"}, r"is no preset: its format is 'other'; `ortho-fx harvest` makes one"),
        ({"version": 2}, "has version 2 of presets; this release reads 1"),
        ({"parameters": {}}, "is a damaged preset: a fourier 1 expansion has finite parameters of sizes"),
        ({"parameters": None}, "is a damaged preset: AttributeError"),
        ({"expansion": {"basis": "bessel"}}, "basis must be one of"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(values | changes))
        with pytest.raises(OrthoFxError, match=f"bad.json:? {message}"):
            read_preset(tmp_path / "bad.json")
    with pytest.raises(
        OrthoFxError, match=r"^there is no file .*none\.json, and these presets come with the package: "
    ):
        make_activation(ExpansionConfig("fourier", 1, init=f"preset:{tmp_path / 'none.json'}"))


def test_runs_that_cannot_be_harvested_are_named(tmp_path):
    fourier = a_run(tmp_path / "a", SINE)
    hermite = a_run(tmp_path / "b", {"coefficients": [0.0, 1.0]}, ExpansionConfig("hermite", 1))
    with pytest.raises(OrthoFxError, match="b has a hermite 1 expansion at layer0, and those before are fourier 1"):
        harvest([fourier, hermite])
    (hermite / "expansions.safetensors").unlink()
    with pytest.raises(OrthoFxError, match="b holds no expansions that were measured"):
        harvest([hermite])
    with pytest.raises(OrthoFxError, match="error must be above zero; got -1"):
        harvest([fourier], error=-1)
    with pytest.raises(OrthoFxError, match="at least one run"):
        harvest([])


def test_the_preset_is_close_where_the_inputs_are_at_the_end(tmp_path):
    """A wave that is a line for the inputs at the start, and fits no other line or cubic where they are at the end."""
    wide = {**SINE, "frequencies": [0.1]}
    preset = harvest([a_run(tmp_path / "a", wide, inputs=((0.3, 0.25), (0.0, 2.0)), grown=20.0)])
    z = torch.linspace(-50, 50, 101, dtype=torch.float64)
    c = {name: torch.from_numpy(value) for name, value in preset.parameters.items()}
    y = c["constant"] + c["coefficients"] * torch.cos(c["frequencies"] * z - c["phases"])
    torch.testing.assert_close(y, 0.2 + 1.5 * torch.sin(0.1 * z), rtol=0, atol=1e-5)


def test_inputs_that_were_all_equal_are_refused(tmp_path):
    with pytest.raises(OrthoFxError, match="a: layer0: its inputs were all equal when they were measured"):
        harvest([a_run(tmp_path / "a", SINE, grown=0.0)])


@pytest.mark.parametrize("name", presets())
def test_presets_of_the_package_are_starts_by_their_names(name):
    config = replace(read_preset(name).expansion, init=f"preset:{name}")
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    rewrite_(model, config)
    batch = 3 * torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + 1
    calibrate_(model, [batch])
    assert gains(model[1]).forward > 0
    assert model(batch).isfinite().all()


@pytest.mark.slow
def test_a_frozen_preset_has_no_gradient_kernel(preset):
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.GELU(), nn.Linear(512, 256, bias=False))

    def kernels():
        code = triton_code(model, torch.empty(4096, 256, device="meta", requires_grad=True), whole=4096 * 512)
        assert [(k.loads, k.stores) for k in code.forward.big] == [(1, 1)]
        return [(k.loads, k.stores) for k in code.backward.big], len(code.backward.small)

    gelu = kernels()
    rewrite_(model, ExpansionConfig("fourier", 1, init=f"preset:{preset}"))
    learns = kernels()
    freeze_(model)
    assert kernels() == gelu
    assert learns != gelu


@pytest.mark.slow
def test_train_harvest_and_train_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(gpt2.PRESETS, "tiny", gpt2.GPT2Config(256, 16, 2, 2, 32))
    train = "train gpt2 --size tiny --steps 3 --batch-size 4 --no-compile --basis fourier".split()
    assert main([*train, "--degree", "2", "--out", "first"]) == 0
    assert main(["harvest", "first", "--out", "sine.json", "--error", "0.2"]) == 0
    assert "sine.json: start from it by init preset:sine.json" in capsys.readouterr().out
    degree = str(read_preset("sine.json").expansion.degree)
    assert main([*train, "--degree", degree, "--init", "preset:sine.json", "--out", "second"]) == 0
    capsys.readouterr()
    assert main([*train, "--degree", "7", "--init", "preset:sine.json", "--out", "third"]) == 2
    assert "the preset sine.json has degree" in capsys.readouterr().err
