"""Models and data from a user's file: what it must define, and what is refused before the first run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ortho_fx import OrthoFxError
from ortho_fx.models.compare.runs import Budget, compare
from ortho_fx.models.custom import Custom, CustomBatches
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.runs.files import read_rows

pytestmark = pytest.mark.slow

SOURCE = """
import torch
from torch import nn

class Problem:
    def model(self):
        return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))

    def batches(self, seed, size):
        generator = torch.Generator().manual_seed(99 if seed is None else seed)
        for _ in range(2 if seed is None else 1_000_000):
            x = torch.randn(size, 2, generator=generator)
            yield x, x.prod(1, keepdim=True)

    def loss(self, model, batch):
        x, y = batch
        return nn.functional.mse_loss(model(x), y)

class NoLoss(Problem):
    loss = None

class NoModel(Problem):
    def model(self):
        return "a model"

class NoPairs(Problem):
    def batches(self, seed, size):
        yield torch.zeros(size, 2)

class Ends(Problem):
    def batches(self, seed, size):
        yield torch.zeros(size, 2), torch.zeros(size, 1)

class Long(Problem):
    def batches(self, seed, size):
        yield torch.zeros(size + 1, 2), torch.zeros(size + 1, 1)

class Losses(Problem):
    def loss(self, model, batch):
        return model(batch[0]) - batch[1]

class OtherInputs(Problem):
    def model(self):
        return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1))

class NoActivation(Problem):
    def model(self):
        return nn.Linear(2, 1)

class Endless(Problem):
    def batches(self, seed, size):
        while True:
            yield torch.zeros(size, 2), torch.zeros(size, 1)

class Changing(Problem):
    def batches(self, seed, size):
        for _ in range(2 if seed is None else 1_000_000):
            yield torch.rand(size, 2), torch.zeros(size, 1)

class Kept(Problem):
    def model(self):
        from kept_model import MODEL
        return MODEL

class Detached(Problem):
    def loss(self, model, batch):
        return super().loss(model, batch).detach()

class Stuck(Problem):
    def model(self):
        return super().model().requires_grad_(False)

number = 3

def broken():
    raise KeyError("weights")
"""


@pytest.fixture
def problem(tmp_path):
    (tmp_path / "problems.py").write_text(SOURCE)
    (tmp_path / "kept_model.py").write_text(
        "from torch import nn\n\nMODEL = nn.Sequential(nn.Linear(2, 1), nn.ReLU())\n"
    )
    return lambda name: f"{tmp_path}/problems.py:{name}"


def config(model, **changes):
    values = {"steps": 6, "batch_size": 8, "warmup": 1, "eval_every": 3, "compile": False}
    return TrainConfig(model=model, basis="none", **{**values, **changes})


def test_activations_are_compared_on_a_model_of_a_file(tmp_path, problem):
    names = ["own", "prelu", "hermite", "fourier:frozen", "silu:calibrated"]
    budget = Budget(1, timing=False, tune=2, tune_steps=1)
    comparison = compare(config(problem("Problem")), names, budget, tmp_path / "out", reference="own")
    assert comparison.activations == ["own", "prelu", "hermite:3", "fourier:5:frozen", "silu:calibrated"]
    assert all(facts.same_weights for facts in comparison.facts.values())
    assert all(run.diverged is None and list(run.validations) == [3, 6] for run in comparison.runs)
    assert len(comparison.trials) == 10
    # The mean loss of both validation batches at the end.
    assert comparison.runs[0].last["validation_loss"] == pytest.approx(
        read_rows(tmp_path / "out" / "own-seed0" / "metrics.jsonl")[-1]["validation_loss"]
    )


def test_a_step_of_a_file_is_measured(tmp_path, problem):
    comparison = compare(config(problem("Problem")), ["relu"], Budget(1, equal_time=False), tmp_path / "out")
    assert comparison.costs["relu"].seconds > 0


def test_batches_come_by_step_as_often_as_asked(problem):
    data = CustomBatches(Custom.load(problem("Problem")), 4)
    third = data.batch(5, 2, 4)[0]
    assert not torch.equal(data.batch(5, 3, 4)[0], third)
    torch.testing.assert_close(data.batch(5, 2, 4)[0], third)
    torch.testing.assert_close(data.batch(5, 2, 4, slice(1, 3))[0], third[1:3])
    assert not torch.equal(data.batch(6, 2, 4)[0], third)
    assert data.validation_batches(4) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Missing", "must have a function or class Missing; it has nothing of that name"),
        ("number", "must have a function or class number; it is of type int"),
        ("broken", "cannot be built: KeyError: 'weights'"),
        ("NoLoss", "must return an object with the methods model, batches, loss; got a NoLoss without loss"),
        ("NoModel", "must return a torch.nn.Module; got str"),
        ("NoPairs", "must be pairs of tensors, inputs and targets, with as many rows; got [(8, 2)]"),
        ("Long", "must have 8 rows; got 9"),
        ("Losses", "must return a tensor of one number; got a tensor of shape (4, 1)"),
        ("OtherInputs", "mat1 and mat2 shapes cannot be multiplied (4x2 and 3x16)"),
        ("NoActivation", "gelu: "),
        ("Endless", "Endless had not ended after 10,001 batches, 0.00096 GB: without a seed it has the validation"),
        ("Changing", "Changing began with another batch at its second call: the same seed must give the same batches"),
        ("Kept", "Kept must return a new model; 0 is from an earlier call, and two runs would"),
        ("Detached", "Detached has no gradient: it is not computed from parameters that learn"),
        ("Stuck", "Stuck has no gradient: it is not computed from parameters that learn"),
    ],
)
def test_a_factory_that_returns_something_else_is_one_line(tmp_path, problem, name, message):
    with pytest.raises(OrthoFxError) as caught:
        compare(config(problem(name)), ["relu"], Budget(1, timing=False), tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*/metrics.jsonl"))


def test_batches_that_end_say_so(tmp_path, problem):
    with pytest.raises(OrthoFxError, match=r"batches\(0, 8\) of .*Ends ended before step 2: it must not end"):
        compare(config(problem("Ends")), ["relu"], Budget(1, timing=False), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"), [("data", "digits"), ("gated", True), ("augment", "light"), ("label_smoothing", 0.1)]
)
def test_settings_of_our_models_are_refused(problem, name, value):
    with pytest.raises(
        OrthoFxError, match=rf"^{name} is a setting of our own models; that of .*Problem is in its file$"
    ):
        config(problem("Problem"), **{name: value})


def test_two_runs_at_a_time_have_the_numbers_of_one(tmp_path, problem):
    said = []
    names, settings = ["own", "hermite"], config(problem("Problem"))
    one = compare(settings, names, Budget(1, timing=False), tmp_path / "one", reference="own")
    budget = Budget(1, timing=False, jobs=2)
    two = compare(settings, names, budget, tmp_path / "two", reference="own", progress=said.append)
    assert said[1:] == ["1 of 2: own, seed 0", "2 of 2: hermite:3, seed 0"]
    losses = [{run.activation: run.validations for run in found.runs} for found in (one, two)]
    assert losses[0] == losses[1]


def test_runs_end_with_the_process_that_started_them(tmp_path, problem):
    arguments = ["compare", problem("Problem"), "--activations", "own", "relu", "--reference", "own", "--no-timing"]
    arguments += ["--jobs", "2", "--steps", "1000000", "--no-compile", "--seeds", "1", "--out", str(tmp_path / "out")]
    command = f"from ortho_fx.cli import main\nif __name__ == '__main__':\n    main({arguments!r})\n"
    (tmp_path / "start.py").write_text(command)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, tmp_path / "start.py"], env=environment, stdout=subprocess.DEVNULL)
    rows = [tmp_path / "out" / f"{name}-seed0" / "metrics.jsonl" for name in ("own", "relu")]
    try:
        deadline = time.monotonic() + 300
        while not all(path.exists() and path.stat().st_size for path in rows):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    before: list[int] = []
    while before != (before := _sizes(rows)):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _sizes(paths: list[Path]) -> list[int]:
    return [path.stat().st_size for path in paths]


def test_the_exact_solution_of_the_poisson_problem_has_no_loss():
    problem = Custom.load(f"{Path(__file__).parents[2] / 'benchmarks' / 'poisson.py'}:Poisson")

    class Exact(torch.nn.Module):
        def forward(self, points):
            x, y = (torch.pi * points).unbind(-1)
            return x.sin() * y.sin() + (3 * x).sin() * (2 * y).sin() / 2

    batch = next(problem.hooks.batches(0, 64))
    assert problem.loss(Exact(), batch) < 1e-4 * batch[1].square().mean()
    assert problem.loss(Exact().eval(), next(problem.hooks.batches(None, 64))) < 1e-5
    assert problem.loss(problem.model(), batch) > 1
