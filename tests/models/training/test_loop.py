"""Training end to end, on models small enough for a test."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch

from ortho_fx import ExpansionActivation, ExpansionConfig, FrozenExpansion, OrthoFxError, rewrite_
from ortho_fx.models import convnext, gpt2
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.runs.files import read_run
from ortho_fx.models.training.checkpoint import checkpoints
from ortho_fx.models.training.loop import Diverged, Run, train
from ortho_fx.models.training.optimization import Step
from ortho_fx.models.training.processes import Processes
from ortho_fx.models.weights.bundle import load_model
from tests.kinds import COMPILED_BASES

pytestmark = pytest.mark.slow

SMALL_GPT2 = gpt2.GPT2Config(vocabulary=256, context=16, layers=2, heads=2, width=32)
SMALL_CONVNEXT = convnext.ConvNeXtConfig(1, 10, 2, (1, 1), (32, 64), layer_scale=1.0)
ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def test_presets(monkeypatch):
    monkeypatch.setitem(gpt2.PRESETS, "test", SMALL_GPT2)
    monkeypatch.setitem(convnext.PRESETS, "test", SMALL_CONVNEXT)


def small(tmp_path, **changes):
    values = {"size": "test", "steps": 12, "batch_size": 16, "lr": 5e-3, "warmup": 2, "out": str(tmp_path / "run")}
    return TrainConfig(**{**values, **changes})


@pytest.mark.parametrize("basis", COMPILED_BASES)
@pytest.mark.parametrize("model", ["gpt2", "convnext"])
def test_compiled_training_lowers_the_loss_and_reaches_every_expansion(tmp_path, model, basis):
    pace = {"lr": 5e-3, "steps": 40} if model == "gpt2" else {"lr": 2e-3, "warmup": 5, "steps": 60}
    run = Run(small(tmp_path, model=model, basis=basis, degree=2, batch_size=32, **pace), ALONE)
    start = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    result = run.start(resume=False, overwrite=False)
    losses = list(result.losses.values())
    assert sum(losses[-4:]) / 4 < 0.9 * losses[0]
    expansions = [(n, m) for n, m in run.model.named_modules() if isinstance(m, ExpansionActivation)]
    assert len(expansions) == 2
    for name, expansion in expansions:
        for key, parameter in expansion.named_parameters():
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0, (name, key)
            assert not torch.equal(parameter, start[f"{name}.{key}"])


@pytest.mark.parametrize("model", ["gpt2", "convnext"])
def test_expansions_a_channel_with_clamps_train(tmp_path, model):
    config = small(tmp_path, model=model, granularity="channel", clamp=4.0, compile=False, lr=1e-3, steps=20)
    run = Run(config, ALONE)
    result = run.start(resume=False, overwrite=False)
    expansions = [m for m in run.model.modules() if isinstance(m, ExpansionActivation)]
    assert [m.coefficients.shape for m in expansions] == [(5, 4 * w) for w in ((32, 32), (32, 64))[model == "convnext"]]
    assert all(m.bounds is not None for m in expansions)
    assert result.losses[20] < result.losses[1]


@pytest.mark.parametrize("basis", COMPILED_BASES)
@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: gpt2.GPT2(replace(SMALL_GPT2, layers=1)), torch.arange(32).reshape(2, 16)),
        (
            lambda: convnext.ConvNeXt(replace(SMALL_CONVNEXT, depths=(1,), widths=(32,))),
            torch.linspace(-1, 1, 128, dtype=torch.float64).reshape(2, 1, 8, 8),
        ),
    ],
    ids=["gpt2", "convnext"],
)
def test_the_hook_and_rewrite_agree_to_float64_precision(build, inputs, basis):
    torch.manual_seed(0)
    hooked = build().double()
    torch.manual_seed(0)
    rewritten = build().double()
    # Of a low degree: formulas are unrolled, and compiling takes most of the time.
    rewrite_(rewritten, ExpansionConfig(basis, 2))
    compiled = torch.compile(hooked, backend="ortho_fx", options={"basis": basis, "degree": 2})
    outputs = compiled(inputs), rewritten(inputs)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    for output in outputs:
        output.square().mean().backward()
    ours, theirs = dict(hooked.named_parameters()), dict(rewritten.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-9, atol=1e-12)


def stop_at(run, losses_before, number):
    """Sends a signal to the run during the step after `losses_before` steps."""
    step = run.optimization.step

    def stopping(*arguments):
        if len(run.result.losses) == losses_before:
            signal.raise_signal(number)
        return step(*arguments)

    run.optimization.step = stopping


@pytest.mark.parametrize(
    ("model", "changes"),
    [("gpt2", {"dropout": 0.2, "freeze": True}), ("convnext", {"drop_path": 0.2, "ema": 0.9, "optimizer": "muon"})],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_resumed_run_repeats_the_losses_to_the_last_bit(tmp_path, model, changes, number):
    same = {"model": model, "compile": False, "eval_every": 4, "save_every": 5, "accumulate": 2, **changes}
    whole = train(small(tmp_path, out=str(tmp_path / "whole"), **same))
    config = small(tmp_path, **same)
    interrupted = Run(config, ALONE)
    stop_at(interrupted, 8, number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
        interrupted.start(resume=False, overwrite=False)
    if number == signal.SIGTERM:
        assert stopped.value.code == 143
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 10, "lo')
    resumed = train(config, resume=True)
    assert len(interrupted.result.losses) == 9  # the current step was finished first
    assert resumed.losses == whole.losses
    assert resumed.validations == whole.validations
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] for row in rows] == list(whole.losses.values())
    inputs = resumed_inputs(model)
    models = [load_model(tmp_path / out / "model.safetensors").eval() for out in ("run", "whole")]
    assert torch.equal(models[0](inputs), models[1](inputs))


def resumed_inputs(model):
    return torch.arange(16).reshape(1, 16) if model == "gpt2" else torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    whole = train(small(tmp_path, compile=False, save_every=4, out=str(tmp_path / "whole")))
    script = """
    import os, sys
    from ortho_fx.models import gpt2
    from ortho_fx.models.recipe import TrainConfig
    from ortho_fx.models.training import loop
    gpt2.PRESETS["test"] = gpt2.GPT2Config(vocabulary=256, context=16, layers=2, heads=2, width=32)
    config = TrainConfig(
        size="test", steps=12, batch_size=16, lr=5e-3, warmup=2, compile=False, save_every=4, out=sys.argv[1]
    )
    run = loop.Run(config, loop.Processes(0, 1, loop.torch.device("cpu")))
    step = run.optimization.step
    def step_or_wait(number, parts):
        if number == 10:
            print("stands at", number, flush=True)
            sys.stdin.read()
        return step(number, parts)
    run.optimization.step = step_or_wait
    run.start(resume=False, overwrite=False)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "stands at 10" in child.stdout.read(len("stands at 10"))
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    # An interrupted save leaves such a directory.
    (tmp_path / "run" / "checkpoints" / "step-00000012.partial").mkdir()
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000004", "step-00000008"]
    resumed = train(small(tmp_path, compile=False, save_every=4), resume=True)
    assert resumed.losses == whole.losses
    assert resumed.validations == whole.validations
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000008", "step-00000012"]


def test_what_a_run_leaves_can_be_read(tmp_path):
    result = train(small(tmp_path, compile=False, steps=6, eval_every=3, keep=1, save_every=2))
    run = read_run(tmp_path / "run")
    assert [row["step"] for row in run.rows] == list(range(1, 7))
    assert all(row["seconds"] > 0 and row["gradient_norm"] > 0 for row in run.rows)
    assert {row["step"]: row["validation_loss"] for row in run.validations} == {
        step: measured["validation_loss"] for step, measured in result.validations.items()
    }
    assert [(row["step"], row["site"]) for row in run.site_rows] == [
        (step, f"blocks.{block}.mlp.act") for step in (0, 3, 6) for block in (0, 1)
    ]
    assert run.config["parameters"] == result.parameters
    assert (run.start.step, run.now.step) == (0, 6)
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000006"]
    model = load_model(tmp_path / "run" / "model.safetensors")
    sites = {name: m for name, m in model.named_modules() if isinstance(m, ExpansionActivation)}
    for name, expansion in sites.items():
        assert torch.equal(expansion.coefficients, run.now.sites[name].activation.coefficients)


def test_micro_batches_take_the_same_steps(tmp_path):
    whole, parts = (
        train(small(tmp_path, compile=False, accumulate=accumulate, out=str(tmp_path / str(accumulate))))
        for accumulate in (1, 4)
    )
    assert list(parts.losses.values()) == pytest.approx(list(whole.losses.values()), rel=1e-4)
    assert parts.validations[12]["validation_loss"] == pytest.approx(whole.validations[12]["validation_loss"], rel=1e-4)


def test_a_batch_that_does_not_divide_is_an_error(tmp_path):
    with pytest.raises(OrthoFxError, match="batch_size must divide into 1 process of 3 micro-batches each; got 16"):
        train(small(tmp_path, accumulate=3))


def test_overwriting_removes_what_was_there(tmp_path):
    train(small(tmp_path, compile=False, steps=4, save_every=2))
    overwriting = Run(small(tmp_path, compile=False, steps=4, save_every=4), ALONE)
    stop_at(overwriting, 0, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        overwriting.start(resume=False, overwrite=True)
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000001"]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_on_other_data_is_not_resumed(tmp_path, monkeypatch):
    config = small(tmp_path, compile=False, steps=1)
    train(config)
    monkeypatch.setattr("platform.python_version", lambda: "2.7.0")
    with pytest.raises(OrthoFxError, match=r"data is 'standard library of Python .*' there and .* Python 2\.7\.0"):
        train(config, resume=True)


def test_a_checkpoint_is_not_overwritten_unasked_nor_resumed_by_another_run(tmp_path):
    config = small(tmp_path, compile=False, steps=1)
    train(config)
    with pytest.raises(OrthoFxError, match=r"holds a checkpoint: pass --resume or --overwrite"):
        train(config)
    with pytest.raises(OrthoFxError, match="basis is 'fourier' there and 'hermite' here"):
        train(small(tmp_path, compile=False, steps=1, basis="hermite"), resume=True)
    train(config, overwrite=True)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_site(tmp_path):
    with pytest.raises(Diverged, match=r"^the (loss|norm of the gradient) is (nan|inf) at step \d+: .*try "):
        train(small(tmp_path, compile=False, lr=1e6, clip=1e12, warmup=0))
    rows = read_run(tmp_path / "run").rows
    assert rows[-1]["skipped"]


def test_bad_steps_are_left_out_when_asked_to(tmp_path):
    config = small(tmp_path, compile=False, skip_bad_steps=1, save_every=6)
    run = Run(config, ALONE)
    step, weights = run.optimization.step, {}

    def spoilt(number, parts):
        weights[number] = [p.detach().clone() for p in run.model.parameters()]
        if number not in (4, 9):
            return step(number, parts)
        losses = run.optimization.losses
        run.optimization.losses = lambda *batch: losses(*batch) * float("nan")
        try:
            return step(number, parts)
        finally:
            run.optimization.losses = losses

    run.optimization.step = spoilt
    with pytest.raises(Diverged, match="the loss is nan at step 10: "):
        run.start(resume=False, overwrite=False)
    rows = read_run(tmp_path / "run").rows
    assert [row["step"] for row in rows if row.get("skipped")] == [5, 10]
    assert all(map(torch.equal, weights[4], weights[5]))
    assert not all(map(torch.equal, weights[5], weights[6]))
    # A resumed run knows the number of skipped steps.
    resumed = Run(config, ALONE)
    resumed.optimization.step = lambda number, parts: Step(1.0, math.nan, 0.0, finite=False)
    with pytest.raises(Diverged, match="the norm of the gradient is nan at step 7: "):
        resumed.start(resume=True, overwrite=False)


def test_the_untouched_model_has_no_expansion(tmp_path):
    result = train(small(tmp_path, compile=False, steps=1, basis="none"))
    assert result.expansion_parameters == 0
    assert read_run(tmp_path / "run").site_rows == []


def test_convnext_reports_its_accuracy(tmp_path):
    result = train(small(tmp_path, model="convnext", compile=False, steps=1))
    assert 0 <= result.validations[1]["accuracy"] <= 1


def test_images_train_with_everything_that_regularises(tmp_path):
    everything = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "drop_path": 0.1, "ema": 0.99, "workers": 2}
    result = train(small(tmp_path, model="convnext", compile=False, steps=30, lr=2e-3, **everything))
    assert result.validations[30]["validation_loss"] < 2.2
    assert result.validations[30]["accuracy"] > 0.2


def test_bfloat16_trains_compiled(tmp_path):
    result = train(small(tmp_path, dtype="bfloat16", steps=20))
    assert result.losses[20] < 0.8 * result.losses[1]


def test_fine_tuning_starts_from_a_run_with_fits_of_its_activations(tmp_path):
    gelu = train(small(tmp_path, compile=False, basis="none", steps=30, out=str(tmp_path / "gelu")))
    config = small(
        tmp_path, compile=False, basis="tropical_rational", start_from=str(tmp_path / "gelu"), lr=1e-6, steps=1
    )
    assert config.init == "fit"
    tuned = train(config)
    assert tuned.validations[1]["validation_loss"] == pytest.approx(gelu.validations[30]["validation_loss"], abs=5e-3)
    again = train(replace(config, start_from=config.out, out=str(tmp_path / "again")))
    assert again.expansion_parameters == tuned.expansion_parameters
    with pytest.raises(OrthoFxError, match=r"holds expansions tropical_rational 6, and the run asks for hermite 3"):
        train(replace(config, basis="hermite", degree=3, start_from=config.out, out=str(tmp_path / "other")))
    with pytest.raises(OrthoFxError, match="it is a gpt2, and has to be a convnext"):
        train(small(tmp_path, model="convnext", start_from=config.out, out=str(tmp_path / "other")))


def test_frozen_expansions_keep_the_function_that_they_start_with(tmp_path):
    learned = train(small(tmp_path, compile=False, basis="fourier", degree=2, out=str(tmp_path / "learned")))
    for start in ({"degree": 2, "start_from": learned.config.out}, {"degree": 1}):
        run = Run(small(tmp_path, basis="fourier", freeze=True, clip=0.5, **start), ALONE)
        frozen = [module for module in run.model.modules() if isinstance(module, FrozenExpansion)]
        assert len(frozen) == 2
        before = [module.state_dict() for module in frozen]
        before = [{name: value.clone() for name, value in state.items()} for state in before]
        result = run.start(resume=False, overwrite=True)
        assert result.expansion_parameters == 0
        assert result.losses[12] < result.losses[1]
        for module, state in zip(frozen, before, strict=True):
            assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
    loaded = load_model(tmp_path / "run" / "model.safetensors").eval()
    assert torch.equal(loaded(resumed_inputs("gpt2")), run.model.eval()(resumed_inputs("gpt2")))
    again = small(tmp_path, basis="fourier", degree=1, start_from=str(tmp_path / "run"), out=str(tmp_path / "again"))
    with pytest.raises(
        OrthoFxError, match=r"holds frozen expansions fourier 1, and the run asks for fourier 1, which learn$"
    ):
        train(again)
    assert train(replace(again, freeze=True, compile=False)).expansion_parameters == 0


TORCHRUN = """
from ortho_fx.models import gpt2
from ortho_fx.cli import command
gpt2.PRESETS["test"] = gpt2.GPT2Config(vocabulary=256, context=16, layers=2, heads=2, width=32)
command()
"""


def on_two_processes(tmp_path, *options):
    script = tmp_path / "train.py"
    script.write_text(TORCHRUN)
    settings = "train gpt2 --size test --steps 12 --batch-size 16 --lr 5e-3 --warmup 2".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command += [*settings, "--save-every", "6", "--no-compile", "--out", str(tmp_path / "run"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one_and_one_resumes_what_two_saved(tmp_path, parallel):
    config = small(tmp_path, compile=False, save_every=6)
    alone = train(replace(config, out=str(tmp_path / "alone")))
    done = on_two_processes(tmp_path, "--parallel", parallel, "--accumulate", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gpt2 test with fourier 5") == 1  # only one process prints
    run = read_run(tmp_path / "run")
    assert [row["loss"] for row in run.rows] == pytest.approx(list(alone.losses.values()), rel=1e-4)
    assert run.validations[-1]["validation_loss"] == pytest.approx(alone.validations[12]["validation_loss"], rel=1e-4)
    exported = load_model(tmp_path / "run" / "model.safetensors").state_dict()
    for name, weight in load_model(tmp_path / "alone" / "model.safetensors").state_dict().items():
        torch.testing.assert_close(exported[name], weight, rtol=1e-3, atol=1e-4)
    (tmp_path / "run" / "checkpoints" / "step-00000012" / "state.json").unlink()
    resumed = train(config, resume=True)
    assert list(resumed.losses.values()) == pytest.approx(list(alone.losses.values()), rel=1e-4)


def test_two_processes_resume_what_one_saved(tmp_path):
    config = small(tmp_path, compile=False, save_every=6)
    alone = train(config)
    (tmp_path / "run" / "checkpoints" / "step-00000012" / "state.json").unlink()
    done = on_two_processes(tmp_path, "--parallel", "fsdp", "--resume")
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in read_run(tmp_path / "run").rows]
    assert losses == pytest.approx(list(alone.losses.values()), rel=1e-4)


@pytest.mark.smoke
def test_mistakes_of_two_processes_end_both(tmp_path):
    began = time.monotonic()
    done = on_two_processes(tmp_path, "--accumulate", "3")
    assert done.returncode == 1
    assert "batch_size must divide into 2 processes of 3 micro-batches each; got 16" in done.stderr
    assert time.monotonic() - began < 120
