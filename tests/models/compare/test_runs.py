"""Comparisons of activations end to end, on models small enough for a test."""

import json
import signal

import pytest

from ortho_fx import OrthoFxError
from ortho_fx.models import convnext, gpt2
from ortho_fx.models.compare import runs as module
from ortho_fx.models.compare.runs import compare, load_comparison
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.runs.files import read_rows
from ortho_fx.models.training.optimization import Optimization

pytestmark = pytest.mark.slow

SMALL_GPT2 = gpt2.GPT2Config(vocabulary=256, context=8, layers=1, heads=2, width=16)
SMALL_CONVNEXT = convnext.ConvNeXtConfig(1, 10, 2, (1,), (16,), layer_scale=1.0)


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    monkeypatch.setitem(gpt2.PRESETS, "test", SMALL_GPT2)
    monkeypatch.setitem(convnext.PRESETS, "test", SMALL_CONVNEXT)
    monkeypatch.setattr(module, "_ROUNDS", 2)


@pytest.fixture
def trained(monkeypatch):
    """Records the directory of each run that is trained, and whether it was resumed."""
    runs = []

    def train(config, *, resume, to_go_on, train=module.train):
        runs.append((config.directory.name, resume))
        return train(config, resume=resume, to_go_on=to_go_on)

    monkeypatch.setattr(module, "train", train)
    return runs


def small(**changes):
    values = {"size": "test", "steps": 4, "batch_size": 4, "warmup": 1, "eval_every": 2, "compile": False}
    return TrainConfig(**{**values, **changes})


def test_every_activation_is_trained_with_every_seed(tmp_path, trained):
    said = []
    comparison = compare(small(seed=7), ["hermite"], 2, tmp_path, timing=False, progress=said.append)
    names = ["gelu-seed7", "hermite-3-seed7", "gelu-seed8", "hermite-3-seed8"]
    assert trained == [(name, False) for name in names]
    assert said[1] == "run 2 of 4: hermite:3, seed 7"
    assert comparison.activations == ["gelu", "hermite:3"]
    assert comparison.seeds == [7, 8]
    for run, name in zip(comparison.runs, names, strict=True):
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        expected = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
        assert {step: values["validation_loss"] for step, values in run.validations.items()} == expected
        assert list(expected) == [2, 4]
        assert run.expansion_parameters == (4 if run.activation == "hermite:3" else 0)
    assert load_comparison(tmp_path) == comparison
    assert "hermite:3" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_runs_of_one_seed_start_from_the_same_weights_on_the_same_batch(tmp_path):
    compare(small(steps=1), ["gelu", "gelu,lr=0.5"], 2, tmp_path, timing=False)
    names = ["gelu-seed0", "gelu-lr-0.5-seed0", "gelu-seed1"]
    one, other, next_seed = (read_rows(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in names)
    assert one == other != next_seed


def test_an_interrupted_comparison_goes_on_to_the_same_numbers(tmp_path, trained, monkeypatch):
    whole = compare(small(), ["hermite"], 2, tmp_path / "whole", timing=False)
    trained.clear()
    step, calls = Optimization.step, []

    def interrupt(self, number, parts):
        calls.append(number)
        if len(calls) == 6:  # the second step of the second run
            signal.raise_signal(signal.SIGINT)
        return step(self, number, parts)

    monkeypatch.setattr(Optimization, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(small(), ["hermite"], 2, tmp_path / "out", timing=False)
    monkeypatch.setattr(Optimization, "step", step)
    assert [run.directory for run in load_comparison(tmp_path / "out").runs] == ["gelu-seed0"]
    resumed = compare(small(), ["hermite"], 2, tmp_path / "out", timing=False)
    assert trained == [
        ("gelu-seed0", False),
        ("hermite-3-seed0", False),
        ("hermite-3-seed0", True),
        ("gelu-seed1", False),
        ("hermite-3-seed1", False),
    ]
    assert [run.validations for run in resumed.runs] == [run.validations for run in whole.runs]


def test_more_activations_and_seeds_train_what_is_missing(tmp_path, trained):
    compare(small(steps=1), ["hermite"], 1, tmp_path, timing=False)
    trained.clear()
    comparison = compare(small(steps=1), ["fourier:2"], 1, tmp_path, timing=False)
    assert [name for name, _ in trained] == ["fourier-2-seed0"]
    assert comparison.activations == ["gelu", "hermite:3", "fourier:2"]
    trained.clear()
    comparison = compare(small(steps=1), ["hermite"], 2, tmp_path, reference="hermite", timing=False)
    assert [name for name, _ in trained] == ["hermite-3-seed1"]
    assert comparison.activations == ["hermite:3", "gelu", "fourier:2"]
    assert len(comparison.runs) == 4


def test_a_run_that_diverges_is_noted_and_the_others_go_on(tmp_path, trained):
    wild = "gelu,lr=1e18,clip=inf,warmup=0"
    comparison = compare(small(), [wild, "hermite"], 1, tmp_path, timing=False)
    diverged = comparison.find("gelu,clip=inf,lr=1e+18,warmup=0", 0)
    assert " at step 2: " in diverged.diverged
    assert [run.activation for run in comparison.runs if run.diverged is None] == ["gelu", "hermite:3"]
    assert f"lr=1e+18,warmup=0 diverged with seed 0: {diverged.diverged}" in " ".join(str(comparison).split())
    trained.clear()
    compare(small(), [wild, "hermite"], 1, tmp_path, timing=False)
    assert trained == []


def test_whatever_else_goes_wrong_ends_the_comparison(tmp_path, monkeypatch):
    def train(config, *, resume, to_go_on):
        raise OrthoFxError("the disk is full")

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(OrthoFxError, match=r"^the disk is full$"):
        compare(small(), ["hermite"], 1, tmp_path, timing=False)


def test_other_settings_are_refused_unless_they_replace_what_is_there(tmp_path, trained):
    compare(small(steps=1), ["fourier:2"], 1, tmp_path, timing=False)
    with pytest.raises(OrthoFxError) as caught:
        compare(small(steps=1, lr=0.01, eval_every=1), ["fourier:2"], 1, tmp_path, timing=False)
    assert str(caught.value) == (
        f"{tmp_path} holds a comparison with other settings: eval_every is 2 there and 1 here, lr is 0.004 there and "
        "0.01 here; choose another --out, or pass --overwrite"
    )
    compare(small(steps=1, basis="fourier", tied=True, keep=1), ["fourier:2"], 1, tmp_path, timing=False)
    trained.clear()
    comparison = compare(small(steps=2), ["hermite"], 1, tmp_path, timing=False, overwrite=True)
    assert trained == [("gelu-seed0", False), ("hermite-3-seed0", False)]
    assert comparison.activations == ["gelu", "hermite:3"]
    assert not (tmp_path / "fourier-2-seed0").exists()


def test_a_step_is_measured_as_it_is_trained_and_once_for_those_that_are_alike(tmp_path, monkeypatch):
    measured = []

    def bench(config, candidates, bench=module.bench):
        report = bench(config, candidates=candidates)
        measured.append([m.name for m in report.measurements])
        return report

    monkeypatch.setattr(module, "bench", bench)
    config = small(model="convnext", steps=1, accumulate=2, mixup=0.2)
    names = ["gelu,lr=0.1", "hermite", "hermite:3,init=fit", "tropical,granularity=channel"]
    comparison = compare(config, names, 1, tmp_path)
    assert measured == [["gelu", "hermite:3", "tropical:5,granularity=channel"]]
    costs = comparison.costs
    assert costs["gelu"] == costs["gelu,lr=0.1"]
    assert costs["hermite:3"] == costs["hermite:3,init=fit"] != costs["gelu"]
    assert costs["gelu"].ratio == 1
    assert all(cost.seconds > 0 and cost.peak_bytes > 0 and cost.rounds <= 2 for cost in costs.values())
    assert json.loads((tmp_path / "compare.json").read_text())["costs"]["gelu"]["seconds"] == costs["gelu"].seconds
    assert {"hardware", "threads", "date", "versions"} <= comparison.costs_environment.keys()
    assert "accuracy %" in str(comparison)
    compare(config, names, 1, tmp_path)
    assert len(measured) == 1
    compare(config, ["fourier:2"], 1, tmp_path)
    assert measured[1] == [*measured[0], "fourier:2"]


def test_the_step_of_a_compiled_run_is_measured_compiled(monkeypatch):
    alone = []
    monkeypatch.setattr(module, "compile_alone", lambda call, setting: alone.append(setting.eager) or call)
    for compiled in (False, True):
        config = small(basis="none", compile=compiled)
        (candidate,) = module._training_steps({"gelu": config}, module._bench_config(config))
        candidate.phases["step"](None)
        assert candidate.compiled == compiled
    assert alone == [False]


def test_a_comparison_is_one_process_with_at_least_one_seed(tmp_path, monkeypatch):
    with pytest.raises(OrthoFxError, match=r"^seeds must be 1 or more; got 0$"):
        compare(small(), ["hermite"], 0, tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OrthoFxError, match=r"^a comparison is one process"):
        compare(small(), ["hermite"], 1, tmp_path)


def test_a_comparison_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(OrthoFxError, match=r"^cannot read .*compare\.json: No such file or directory$"):
        load_comparison(tmp_path)
    path = tmp_path / "compare.json"
    path.write_text("{")
    with pytest.raises(OrthoFxError, match=r"^cannot read .*compare\.json: Expecting property name"):
        load_comparison(tmp_path)
    path.write_text('{"version": 9}')
    with pytest.raises(OrthoFxError, match=r"has version 9; this release reads version 1$"):
        load_comparison(tmp_path)
    path.write_text('{"version": 1}')
    with pytest.raises(OrthoFxError, match=r"not a comparison: KeyError: 'runs'$"):
        load_comparison(tmp_path)
