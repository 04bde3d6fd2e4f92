"""Training end to end, on models small enough for a test."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from ortho_fx import ExpansionActivation, ExpansionConfig, OrthoFxError, rewrite_
from ortho_fx.bases import BASES
from ortho_fx.models import convnext, gpt2, training
from ortho_fx.models.training import TrainConfig, learning_rate_scale, train

SMALL_GPT2 = gpt2.GPT2Config(vocabulary=256, context=16, layers=2, heads=2, width=32)
SMALL_CONVNEXT = convnext.ConvNeXtConfig(1, 10, 2, (1, 1), (32, 64), layer_scale=1.0)


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    monkeypatch.setitem(gpt2.PRESETS, "small", SMALL_GPT2)
    monkeypatch.setitem(convnext.PRESETS, "small", SMALL_CONVNEXT)


def small(tmp_path, **changes):
    values = {"size": "small", "steps": 12, "batch_size": 16, "lr": 5e-3, "warmup": 2, "out": str(tmp_path / "run")}
    return TrainConfig(**{**values, **changes})


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("model", ["gpt2", "convnext"])
def test_compiled_training_lowers_the_loss_and_reaches_every_expansion(tmp_path, model, basis):
    pace = {"lr": 5e-3, "steps": 40} if model == "gpt2" else {"lr": 2e-3, "warmup": 5, "steps": 60}
    run = training._Run(small(tmp_path, model=model, basis=basis, batch_size=32, **pace))
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
    run = training._Run(config)
    result = run.start(resume=False, overwrite=False)
    expansions = [m for m in run.model.modules() if isinstance(m, ExpansionActivation)]
    assert [m.coefficients.shape for m in expansions] == [(4, 4 * w) for w in ((32, 32), (32, 64))[model == "convnext"]]
    assert all(m.bounds is not None for m in expansions)
    assert result.losses[20] < result.losses[1]


@pytest.mark.parametrize("basis", BASES)
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
    rewrite_(rewritten, ExpansionConfig(basis))
    compiled = torch.compile(hooked, backend="ortho_fx", options={"basis": basis})
    outputs = compiled(inputs), rewritten(inputs)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    for output in outputs:
        output.square().mean().backward()
    ours, theirs = dict(hooked.named_parameters()), dict(rewritten.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-9, atol=1e-12)


def test_a_resumed_run_repeats_the_losses_to_the_last_bit(tmp_path):
    whole = train(small(tmp_path, compile=False, save_every=5, out=str(tmp_path / "whole")))
    config = small(tmp_path, compile=False, save_every=5)
    interrupted = training._Run(config)
    interrupt_at = 8

    def stop(inputs, targets, loss=interrupted.loss):
        if len(interrupted.result.losses) == interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return loss(inputs, targets)

    interrupted.loss = stop
    with pytest.raises(KeyboardInterrupt):
        interrupted.start(resume=False, overwrite=False)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 10, "lo')
    resumed = train(config, resume=True)
    assert len(interrupted.result.losses) == interrupt_at + 1  # the step that was under way was finished first
    assert resumed.losses == whole.losses
    assert resumed.validations == whole.validations
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] for row in rows] == list(whole.losses.values())


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
    with pytest.raises(OrthoFxError, match="basis is 'hermite' there and 'fourier' here"):
        train(small(tmp_path, compile=False, steps=1, basis="fourier"), resume=True)
    train(config, overwrite=True)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path):
    with pytest.raises(OrthoFxError, match=r"^the loss is (nan|inf) at step \d+: try a lower --lr"):
        train(small(tmp_path, compile=False, lr=1e6, clip=1e12, warmup=0))


def test_the_untouched_model_has_no_expansion(tmp_path):
    result = train(small(tmp_path, compile=False, steps=1, basis="none"))
    assert result.expansion_parameters == 0


def test_convnext_reports_its_accuracy(tmp_path):
    result = train(small(tmp_path, model="convnext", compile=False, steps=1))
    assert 0 <= result.validations[1]["accuracy"] <= 1


def test_learning_rate_rises_then_falls_to_a_tenth():
    scales = [learning_rate_scale(step, 100, 10) for step in range(101)]
    assert scales[0] == pytest.approx(0.1)
    assert max(scales) == scales[9] == 1
    assert scales[100] == pytest.approx(0.1)
    assert learning_rate_scale(0, 1, 0) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model must be one of gpt2, convnext; got 'bert'"),
        ({"size": "huge"}, "size must be one of tiny, 124m, 350m, 774m, 1.5b, small; got 'huge'"),
        ({"basis": "bessel"}, "basis must be one of hermite, fourier, tropical, tropical_rational; got 'bessel'"),
        ({"basis": "none", "degree": 3}, "degree goes with a basis, and basis is 'none'; got 3"),
        ({"steps": 0}, "steps must be 1 or more; got 0"),
        ({"clip": 0.0}, "clip must be above zero; got 0.0"),
        ({"clip": float("nan")}, "clip must be above zero; got nan"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"device": "nowhere"}, "device 'nowhere' is not available on this machine"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(OrthoFxError) as caught:
        TrainConfig(**changes)
    assert str(caught.value) == message
