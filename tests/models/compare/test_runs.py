"""Comparisons of activations end to end, on models small enough for a test."""

import json
import signal

import pytest
import torch

from ortho_fx import OrthoFxError
from ortho_fx.bench.measure import bench as measure
from ortho_fx.models import convnext, gpt2
from ortho_fx.models.compare import costs, execute
from ortho_fx.models.compare import runs as module
from ortho_fx.models.compare.costs import StepCost
from ortho_fx.models.compare.runs import Budget, compare, load_comparison
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.runs.files import read_rows
from ortho_fx.models.training.optimization import Optimization

pytestmark = pytest.mark.slow

SMALL_GPT2 = gpt2.GPT2Config(vocabulary=256, context=8, layers=1, heads=2, width=16)
SMALL_CONVNEXT = convnext.ConvNeXtConfig(1, 10, 2, (1,), (16,), layer_scale=1.0)
ALL = "relu relu_squared leaky_relu_squared silu prelu xielu polynorm swiglu geglu gelu:calibrated sine:rescaled "
ALL += "hermite:3:gated fourier:5:frozen fourier:2:gated:frozen hermite,granularity=channel,expansion_decay=0.1"
ONE = Budget(1, timing=False)


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    monkeypatch.setitem(gpt2.PRESETS, "test", SMALL_GPT2)
    monkeypatch.setitem(convnext.PRESETS, "test", SMALL_CONVNEXT)
    monkeypatch.setattr(costs, "ROUNDS", 2)


@pytest.fixture
def trained(monkeypatch):
    """Records the directory of each run that is trained, and whether it was resumed."""
    runs = []

    def train(config, *, resume, to_go_on, train=execute.train):
        runs.append((config.directory.name, resume))
        return train(config, resume=resume, to_go_on=to_go_on)

    monkeypatch.setattr(execute, "train", train)
    return runs


@pytest.fixture
def known_costs(monkeypatch):
    """Steps are not measured: those of hermite take twice the time of the others, and those of fourier half."""

    def measured(configs, threads):
        ratios = {name: {"her": 2.0, "fou": 0.5}.get(name[:3], 1.0) for name in configs}
        return {name: StepCost(ratio, ratio, 1000, 1, "here") for name, ratio in ratios.items()}

    monkeypatch.setattr(module, "measure_steps", measured)


def small(**changes):
    values = {"size": "test", "steps": 4, "batch_size": 4, "warmup": 1, "eval_every": 2, "compile": False}
    return TrainConfig(**{**values, **changes})


def test_every_activation_is_trained_with_every_seed(tmp_path, trained):
    said = []
    comparison = compare(small(seed=7), ["hermite"], Budget(2, timing=False), tmp_path, progress=said.append)
    names = ["gelu-seed7", "hermite-3-seed7", "gelu-seed8", "hermite-3-seed8"]
    assert trained == [(name, False) for name in names]
    assert said[0] == "4 runs, 16 steps in all"
    assert said[2] == "2 of 4: hermite:3, seed 7"
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
    assert "hermite:3" in (tmp_path / "compare.csv").read_text()
    assert "hermite:3" in (tmp_path / "compare.tex").read_text()
    assert (tmp_path / "compare.png").stat().st_size > 10_000


@pytest.mark.parametrize("model", ["gpt2", "convnext"])
def test_every_kind_of_activation_is_trained_and_costs_as_many_parameters(tmp_path, model):
    comparison = compare(small(model=model, steps=1), ALL.split(), ONE, tmp_path)
    assert len(comparison.runs) == len(ALL.split()) + 1
    assert all(run.diverged is None for run in comparison.runs)
    unequal = {name for name in comparison.activations if abs(comparison.outcome(name).more_parameters) > 0.01}
    assert unequal == {"hermite:3,expansion_decay=0.1,granularity=channel"}
    others = {name for name, facts in comparison.facts.items() if not facts.same_weights}
    assert others == {"swiglu", "geglu", "hermite:3:gated", "fourier:2:gated:frozen"}
    # No file of weights says what it is of, but those of our models with their own activations.
    saved = {path.parent.name for path in tmp_path.glob("*/model.safetensors")}
    assert {"swiglu-seed0", "fourier-5-frozen-seed0"} <= saved
    assert ("gelu-seed0" in saved) == (model == "convnext")
    assert not saved & {"relu-seed0", "geglu-seed0", "polynorm-3-seed0"}


def test_a_frozen_start_stays_and_coefficients_may_decay(tmp_path):
    names = ["hermite:frozen", "hermite,lr=1.0,expansion_lr=0,expansion_decay=0.5"]
    comparison = compare(small(), names, ONE, tmp_path)
    assert [run.expansion_parameters for run in comparison.runs] == [0, 0, 4]
    config = small(basis="hermite", lr=1.0, expansion_lr=0.5, expansion_decay=0.5)
    groups = Optimization(module.build(config).model, config, execute_processes()).groups
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "decay": 0.1,
        "no_decay": 0.0,
        "expansions": 0.5,
    }


def execute_processes():
    return costs.Processes(0, 1, torch.device("cpu"))


def test_runs_of_one_seed_start_from_the_same_weights_on_the_same_batch(tmp_path):
    compare(small(steps=1), ["gelu", "gelu,lr=0.5"], Budget(2, timing=False), tmp_path)
    names = ["gelu-seed0", "gelu-lr-0.5-seed0", "gelu-seed1"]
    one, other, next_seed = (read_rows(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in names)
    assert one == other != next_seed


def test_an_interrupted_comparison_goes_on_to_the_same_numbers(tmp_path, trained, monkeypatch, known_costs):
    budget = Budget(1, tune=2, tune_steps=3)
    whole = compare(small(), ["hermite"], budget, tmp_path / "whole")
    expected = list(trained)
    assert len(expected) == 4 + 3
    step = Optimization.step
    # In the second trial, and in a run of equal time.
    for stop in (5, 21):
        calls = []

        def interrupt(self, number, parts, calls=calls, stop=stop):
            calls.append(number)
            if len(calls) == stop:
                signal.raise_signal(signal.SIGINT)
            return step(self, number, parts)

        out = tmp_path / f"out{stop}"
        trained.clear()
        monkeypatch.setattr(Optimization, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare(small(), ["hermite"], budget, out)
        monkeypatch.setattr(Optimization, "step", step)
        resumed = compare(small(), ["hermite"], budget, out)
        assert [name for name, again in trained if again] == [expected[_run_of(stop)][0]]
        assert [name for name, again in trained if not again] == [name for name, _ in expected]
        assert [run.validations for run in resumed.runs] == [run.validations for run in whole.runs]
        assert resumed.trials == whole.trials


def _run_of(step):
    """The number of the run that a step is in: four trials of three steps, runs of four steps, one of two."""
    return (step - 1) // 3 if step <= 12 else 4 + (step - 13) // 4


def test_trials_choose_the_rates_of_the_runs_and_leave_nothing(tmp_path, trained, known_costs):
    said = []
    budget = Budget(1, tune=3, tune_steps=2)
    comparison = compare(small(lr=1e-5), ["hermite", "gelu,lr=0.5"], budget, tmp_path, progress=said.append)
    # gelu,lr=0.5 sets its only rate itself.
    assert [trial.number for trial in comparison.trials] == [0, 0, 1, 1, 2, 2]
    assert said[1].startswith("6 trials and 4 runs, 26 steps in all: about 38 seconds")
    chosen = min(comparison.trials_of("hermite:3"), key=lambda trial: trial.loss)
    (run,) = (run for run in comparison.runs if (run.activation, run.steps) == ("hermite:3", 4))
    assert (run.lr, run.expansion_lr) == (chosen.lr, chosen.expansion_lr)
    assert not list((tmp_path / "trials").iterdir())
    assert "Learning rates, chosen after 2 steps" in str(comparison)
    assert read_rows(tmp_path / "hermite-3-seed0" / "metrics.jsonl")[0]["lr"] == chosen.lr


def test_a_run_of_equal_time_ends_its_schedule_there(tmp_path, trained, known_costs):
    comparison = compare(small(warmup=2), ["hermite", "fourier:2", "relu"], Budget(1), tmp_path)
    names = ["gelu-seed0", "hermite-3-seed0", "hermite-3-seed0-steps2", "fourier-2-seed0", "fourier-2-seed0-steps8"]
    assert [name for name, _ in trained] == [*names, "relu-seed0"]
    for name, warmup, steps in ((names[2], 1, 2), (names[4], 4, 8)):
        rates = [row["lr"] / 4e-3 for row in read_rows(tmp_path / name / "metrics.jsonl")]
        assert len(rates) == steps
        assert rates[:warmup] == pytest.approx([(n + 1) / warmup for n in range(warmup)])
        (run,) = (run for run in comparison.runs if run.directory == name)
        # The last twentieth of a few steps is the last one.
        assert run.training_loss == read_rows(tmp_path / name / "metrics.jsonl")[-1]["loss"]
    assert comparison.outcome("relu").at_equal_time == comparison.outcome("relu").at_equal_steps
    trained.clear()
    compare(small(warmup=2), ["hermite", "fourier:2", "relu"], Budget(2, equal_time=False), tmp_path)
    assert [name for name, _ in trained] == [f"{name}-seed1" for name in ("gelu", "hermite-3", "fourier-2", "relu")]


def test_without_runs_of_equal_steps_the_reference_alone_has_them(tmp_path, trained, known_costs):
    comparison = compare(small(), ["hermite", "fourier:2", "relu"], Budget(1, equal_steps=False), tmp_path)
    assert [name for name, _ in trained] == [
        "gelu-seed0",
        "hermite-3-seed0-steps2",
        "fourier-2-seed0-steps8",
        "relu-seed0",
    ]
    outcome = comparison.outcome("hermite:3")
    assert outcome.at_equal_steps == outcome.at_equal_parameters == {}
    assert list(outcome.at_equal_time) == [0]
    trained.clear()
    compare(small(), ["hermite", "fourier:2", "relu"], Budget(1), tmp_path)
    assert [name for name, _ in trained] == ["hermite-3-seed0", "fourier-2-seed0"]


def test_more_activations_and_seeds_train_what_is_missing(tmp_path, trained):
    compare(small(steps=1), ["hermite"], ONE, tmp_path)
    trained.clear()
    comparison = compare(small(steps=1), ["fourier:2"], ONE, tmp_path)
    assert [name for name, _ in trained] == ["fourier-2-seed0"]
    assert comparison.activations == ["gelu", "hermite:3", "fourier:2"]
    trained.clear()
    budget = Budget(2, timing=False)
    comparison = compare(small(steps=1), ["hermite"], budget, tmp_path, reference="hermite")
    assert [name for name, _ in trained] == ["hermite-3-seed1"]
    assert comparison.activations == ["hermite:3", "gelu", "fourier:2"]
    assert len(comparison.runs) == 4


def test_a_run_that_diverges_is_noted_and_the_others_go_on(tmp_path, trained):
    wild = "gelu,lr=1e18,clip=inf,warmup=0"
    comparison = compare(small(), [wild, "hermite"], ONE, tmp_path)
    diverged = comparison.find("gelu,clip=inf,lr=1e+18,warmup=0", 0, 4)
    assert " at step 2: " in diverged.diverged
    assert [run.activation for run in comparison.runs if run.diverged is None] == ["gelu", "hermite:3"]
    shown = " ".join(str(comparison).split())
    assert f"lr=1e+18,warmup=0 diverged with seed 0 in 4 steps: {diverged.diverged}" in shown
    trained.clear()
    compare(small(), [wild, "hermite"], ONE, tmp_path)
    assert trained == []


def test_whatever_else_goes_wrong_ends_the_comparison(tmp_path, monkeypatch):
    def train(config, *, resume, to_go_on):
        raise OrthoFxError("the disk is full")

    monkeypatch.setattr(execute, "train", train)
    with pytest.raises(OrthoFxError, match=r"^the disk is full$"):
        compare(small(), ["hermite"], ONE, tmp_path)


def test_other_settings_are_refused_unless_they_replace_what_is_there(tmp_path, trained):
    compare(small(steps=1), ["fourier:2"], ONE, tmp_path)
    with pytest.raises(OrthoFxError) as caught:
        compare(small(steps=1, lr=0.01, eval_every=1), ["fourier:2"], Budget(1, timing=False, tune=2), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds a comparison with other settings: eval_every is 2 there and 1 here, lr is 0.004 there and "
        "0.01 here, tune is 0 there and 2 here, tune_steps is None there and 1 here; choose another --out, or pass "
        "--overwrite"
    )
    compare(small(steps=1, basis="fourier", tied=True, keep=1), ["fourier:2"], ONE, tmp_path)
    trained.clear()
    (tmp_path / "hermite-3-seed0-steps9").mkdir()
    comparison = compare(small(steps=2), ["hermite"], ONE, tmp_path, overwrite=True)
    assert trained == [("gelu-seed0", False), ("hermite-3-seed0", False)]
    assert comparison.activations == ["gelu", "hermite:3"]
    assert not (tmp_path / "fourier-2-seed0").exists()
    assert not (tmp_path / "hermite-3-seed0-steps9").exists()


def test_a_comparison_of_an_earlier_release_goes_on(tmp_path, trained):
    compare(small(steps=1), ["relu"], ONE, tmp_path)
    path = tmp_path / "compare.json"
    values = json.loads(path.read_text())
    for name in ("gated", "expansion_decay", "tune", "tune_steps"):
        values["settings"].pop(name, None)
    values["environment"]["hardware"] = "an old CPU"
    later = ("steps", "lr", "expansion_lr", "hardware", "torch")
    runs = [{k: v for k, v in run.items() if k not in later} for run in values["runs"]]
    old = {k: v for k, v in values.items() if k not in ("trials", "facts")}
    path.write_text(json.dumps({**old, "version": 1, "runs": runs, "costs_environment": {}}))
    trained.clear()
    comparison = compare(small(steps=1), ["silu"], ONE, tmp_path)
    assert trained == [("silu-seed0", False)]
    here = comparison.environment["hardware"]
    assert [run.hardware for run in comparison.runs] == ["an old CPU", "an old CPU", here]
    assert {run.torch for run in comparison.runs} == {torch.__version__}
    assert f"float32 on cpu (an old CPU and {here}), torch {torch.__version__}," in " ".join(str(comparison).split())
    assert "- Not all runs were trained on one machine and release: " in comparison.report(markdown=True)


def test_a_step_is_measured_as_it_is_trained_and_once_for_those_that_are_alike(tmp_path, monkeypatch):
    measured = []

    def bench(config, candidates):
        report = measure(config, candidates=candidates)
        measured.append([m.name for m in report.measurements])
        return report

    monkeypatch.setattr(costs, "bench", bench)
    config = small(model="convnext", steps=1, accumulate=2, mixup=0.2)
    names = ["gelu,lr=0.1", "hermite", "hermite:3,init=fit", "tropical,granularity=channel"]
    budget = Budget(1, equal_time=False)
    comparison = compare(config, names, budget, tmp_path)
    assert measured == [["gelu", "hermite:3", "tropical:5,granularity=channel"]]
    found = comparison.costs
    assert found["gelu"] == found["gelu,lr=0.1"]
    assert found["hermite:3"] == found["hermite:3,init=fit"] != found["gelu"]
    assert found["gelu"].ratio == 1
    assert all(cost.seconds > 0 and cost.peak_bytes > 0 and cost.rounds <= 2 for cost in found.values())
    assert json.loads((tmp_path / "compare.json").read_text())["costs"]["gelu"]["seconds"] == found["gelu"].seconds
    assert " thread" in found["gelu"].measured
    assert "accuracy %" in str(comparison)
    compare(config, names, budget, tmp_path)
    assert len(measured) == 1
    later = compare(config, ["fourier:2"], budget, tmp_path)
    assert measured[1] == ["gelu", "fourier:2"]
    assert later.costs["gelu"] == found["gelu"]


def test_the_step_of_a_compiled_run_is_measured_compiled(monkeypatch):
    alone = []
    monkeypatch.setattr(costs, "compile_alone", lambda call, setting: alone.append(setting.eager) or call)
    for compiled in (False, True):
        config = small(basis="none", compile=compiled)
        (candidate,) = costs._training_steps({"gelu": config}, costs.bench_config(config, 1))
        candidate.phases["step"](None)
        assert candidate.compiled == compiled
    assert alone == [False]


def test_long_runs_are_measured_in_more_rounds(monkeypatch):
    monkeypatch.setattr(costs, "ROUNDS", 20)
    rounds = [costs.bench_config(small(steps=steps), 1).rounds for steps in (1, 400, 1500, 100_000)]
    assert rounds == [20, 20, 75, 200]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"seeds": 0}, "seeds must be 1 or more; got 0"),
        ({"tune": 1}, "tune must be 0 or at least 2, since the first trial has the rates of the run; got 1"),
        ({"tune_steps": 5}, "tune_steps is of trials, and tune asks for none"),
        ({"jobs": 0}, "jobs must be 1 or more; got 0"),
        (
            {"equal_steps": False, "timing": False},
            "without runs of equal steps, runs of equal time are needed, and these need the timing",
        ),
    ],
)
def test_a_budget_that_is_too_small_says_so(budget, message):
    with pytest.raises(OrthoFxError) as caught:
        Budget(**{"seeds": 1, **budget})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("texts", "budget", "message"),
    [
        (["relu"], {"tune": 2, "tune_steps": 5}, "tune_steps must be at most the 4 steps of a run; got 5"),
        (["hermite,granularity=group:7"], {}, "hermite:3,granularity=group:7: "),
    ],
)
def test_what_cannot_be_trained_ends_before_the_first_run(tmp_path, trained, texts, budget, message):
    with pytest.raises(OrthoFxError) as caught:
        compare(small(), texts, Budget(**{"seeds": 1, "timing": False, **budget}), tmp_path)
    assert str(caught.value).startswith(message)
    assert trained == []


def test_an_activation_whose_step_outlasts_the_whole_run_ends_before_the_first_run(tmp_path, trained, monkeypatch):
    slow = {"gelu": StepCost(1.0, 1.0, 1, 1), "relu": StepCost(9.0, 9.0, 1, 1)}
    monkeypatch.setattr(module, "measure_steps", lambda configs, threads: slow)
    with pytest.raises(OrthoFxError, match=r"^a step of relu takes more time than the 4 steps of gelu: leave it out"):
        compare(small(), ["relu"], Budget(1), tmp_path)
    assert trained == []


def test_a_comparison_is_one_process(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OrthoFxError, match=r"^a comparison is one process"):
        compare(small(), ["hermite"], ONE, tmp_path)


def test_a_comparison_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(OrthoFxError, match=r"^cannot read .*compare\.json: No such file or directory$"):
        load_comparison(tmp_path)
    path = tmp_path / "compare.json"
    path.write_text("{")
    with pytest.raises(OrthoFxError, match=r"^cannot read .*compare\.json: Expecting property name"):
        load_comparison(tmp_path)
    path.write_text('{"version": 9}')
    with pytest.raises(OrthoFxError, match=r"has version 9; this release reads versions 1 and 2$"):
        load_comparison(tmp_path)
    path.write_text('{"version": 1}')
    with pytest.raises(OrthoFxError, match=r"not a comparison: KeyError: 'costs_environment'$"):
        load_comparison(tmp_path)
