"""Constructs each way in which a run can diverge, and tests the line that explains it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, FourierActivation, HermiteActivation, rewrite_
from ortho_fx.models import gpt2
from ortho_fx.models.training.divergence import explain_divergence
from ortho_fx.models.training.monitor import SiteMonitor

X = torch.linspace(-1, 1, 32).reshape(4, 8)
NAN = float("nan")


def network(**settings):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 8), HermiteActivation(3, **settings), nn.Linear(8, 8), HermiteActivation(3, **settings)
    )


def explain(model, forward, rows=(), what="the loss is nan", step=812):
    text = explain_divergence(model, forward, rows, what, step)
    assert "\n" not in text
    assert text.startswith(f"{what} at step {step}: ")
    assert not any(module._forward_hooks for module in model.modules())
    return text.removeprefix(f"{what} at step {step}: ")


def row(step, site, std, drift=0.0):
    values = {"step": step, "site": site, "std": std, "drift": drift}
    return {**values, "mean": 0.0, "low": -std, "high": std, "output_rms": 1.0, "reach": 1.0}


def test_inputs_that_grew_tenfold_are_named_where_and_when_they_first_did():
    rows = [row(0, "1", 1.0), row(0, "3", 0.9)]
    rows += [row(400, "1", 2.0), row(400, "3", 3.0)]
    rows += [row(800, "1", 30.0), row(800, "3", 41.0)]
    model = network()
    assert explain(model, lambda: model(X), rows) == (
        "inputs of 1 left their range first (std 30 at step 800, 1 at the start): "
        "try clamp=4, a lower lr or expansion_lr, or skip_bad_steps"
    )
    rows[3] = row(400, "3", 41.25)
    assert explain(model, lambda: model(X), rows) == (
        "inputs of 3 left their range first (std 41.2 at step 400, 0.9 at the start): "
        "try clamp=4, a lower lr or expansion_lr, or skip_bad_steps"
    )


def test_inputs_that_are_measured_as_not_finite_have_left_their_range():
    model = network()
    found = explain(model, lambda: model(X), [row(10, "1", 1.0), row(20, "1", NAN)])
    assert found.startswith("inputs of 1 left their range first (std nan at step 20, 1 at step 10): ")
    assert explain(model, lambda: model(X), [row(0, "1", NAN)]).startswith(
        "inputs of 1 left their range first (std nan at step 0): "
    )


def test_inputs_that_grew_and_came_back_are_not_blamed():
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = NAN
    rows = [row(0, "1", 1.0), row(100, "1", 50.0), row(200, "1", 2.0)]
    assert explain(model, lambda: model(X), rows).startswith("parameters of 2 are not finite")


@pytest.mark.parametrize(
    ("settings", "drift", "advice"),
    [
        ({}, 0.1, "clamp=4, a lower lr or expansion_lr, or skip_bad_steps"),
        ({}, 0.9, "clamp=4, a lower expansion_lr, or skip_bad_steps"),
        ({"clamp": 3.0}, 0.9, "a lower expansion_lr, or skip_bad_steps"),
        ({"init": "paper"}, 0.1, "clamp=4, init=stable, a lower lr or expansion_lr, or skip_bad_steps"),
    ],
)
def test_advice_depends_on_the_expansion(settings, drift, advice):
    model = network(**settings)
    rows = [row(0, "3", 1.0), row(10, "3", 20.0, drift)]
    assert explain(model, lambda: model(X), rows).endswith(f": try {advice}")


def test_a_bounded_expansion_is_not_to_be_clamped():
    model = nn.Sequential(FourierActivation(5))
    found = explain(model, lambda: model(X), [row(0, "0", 1.0), row(10, "0", 20.0)])
    assert found.endswith(": try a lower lr or expansion_lr, or skip_bad_steps")


def test_an_expansion_that_overflows_on_finite_inputs_is_named_with_these():
    model = network()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.fill_(1e20)
    assert explain(model, lambda: model(X)) == (
        "3 is the first module whose output is not finite (inputs 1e+20 to 1e+20): "
        "try clamp=4, a lower lr or expansion_lr, or skip_bad_steps"
    )


def test_parameters_that_are_not_finite_are_named_where_they_are_first_used():
    model = network()
    with torch.no_grad():
        for layer in (model[0], model[1]):
            next(layer.parameters()).fill_(NAN)
    assert explain(model, lambda: model(X)) == (
        "parameters of 0 are not finite: try an earlier checkpoint, a lower lr, or a smaller clip"
    )


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e38 * 1e38


class Between(nn.Module):
    """An operation that is no module goes wrong between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) / 0.0)


def test_modules_that_are_no_expansions():
    slower = "try a lower lr, a longer warmup, a smaller clip, or skip_bad_steps"
    model = network()
    model.insert(2, Overflow())
    rows = [row(0, "1", 1.0), row(0, "4", 1.0)]
    assert explain(model, lambda: model(X), rows) == f"2 is the first module whose output is not finite: {slower}"
    model = nn.Sequential(Between(), nn.GELU())
    assert explain(model, lambda: model(X)) == f"inputs of 0.second are the first numbers that are not finite: {slower}"


def test_a_batch_that_is_not_finite_is_blamed_and_no_module():
    model = network()
    assert explain(model, lambda: model(X / 0)) == (
        "what comes into 0, the first module, is not finite: try other data, or skip_bad_steps"
    )


def test_a_loss_that_is_not_finite_with_finite_outputs():
    model = network()
    nothing = torch.full((4,), -100)
    assert explain(model, lambda: F.cross_entropy(model(X), nothing)) == (
        "all modules' outputs are finite, but the loss made of them is not: try other targets, or skip_bad_steps"
    )


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * NAN


class Bad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return BadBackward.apply(x)


def test_a_gradient_that_is_not_finite_is_traced_to_where_it_begins():
    model = network()
    model.insert(2, Bad())
    what = "the gradient norm is nan"
    assert explain(model, lambda: model(X).square().mean(), what=what) == (
        "gradients are not finite from 1 backwards: try clamp=4, a lower lr or expansion_lr, or skip_bad_steps"
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    model = nn.Sequential(nn.Linear(8, 8), Bad(), nn.Linear(8, 8))
    assert explain(model, lambda: model(X).square().mean(), what=what) == (
        "gradients are not finite from 0 backwards: try a lower lr, a longer warmup, a smaller clip, or skip_bad_steps"
    )


def test_tied_weights_do_not_hide_where_gradients_begin():
    torch.manual_seed(0)
    model = gpt2.GPT2(gpt2.GPT2Config(vocabulary=16, context=8, layers=2, heads=2, width=8))
    model.blocks[1].mlp.act = Bad()
    tokens = torch.arange(16).reshape(2, 8)
    found = explain(model, lambda: model(tokens).logsumexp(-1).mean(), what="the gradient norm is nan")
    assert found.startswith("gradients are not finite from blocks.1.mlp.expand backwards: ")


@pytest.mark.parametrize("returns_loss", [False, True])
def test_with_everything_finite_the_expansion_farthest_from_its_start_is_named(returns_loss):
    model = network()
    monitor = SiteMonitor(model)
    rows = monitor.measure(lambda: model(X), 0)
    with torch.no_grad():
        model[2].bias += 3 * rows[1]["std"]

    def forward():
        y = model(X)
        return y.square().mean() if returns_loss else y

    found = explain(model, forward, rows, what="the gradient norm is inf")
    assert found.startswith("all outputs are finite; inputs of 3 are farthest out, ")
    assert 3 < float(found.split(" standard deviations")[0].split()[-1]) < 8
    assert "from their mean at the start: try clamp=4, " in found


def test_an_untouched_model_whose_numbers_are_all_finite():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    assert explain(model, lambda: model(X)) == (
        "all modules' outputs are finite: try a lower lr, a longer warmup, a smaller clip, or skip_bad_steps"
    )


def test_random_numbers_and_modes_are_as_before():
    model = network().train()
    model.insert(1, nn.Dropout(0.5))
    state = torch.get_rng_state()
    explain(model, lambda: model(X).sum())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_gpt2_that_really_diverges_is_explained_by_a_site_of_its_own():
    torch.manual_seed(0)
    model = gpt2.GPT2(gpt2.GPT2Config(vocabulary=16, context=8, layers=2, heads=2, width=16))
    tokens = torch.randint(0, 16, (4, 9))
    rewrite_(model, ExpansionConfig("hermite", 8), example_inputs=tokens[:, :8])
    monitor = SiteMonitor(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)

    def loss():
        return F.cross_entropy(model(tokens[:, :8]).flatten(0, 1), tokens[:, 1:].flatten())

    for step in range(60):
        monitor.measure(loss, step)
        value = loss()
        if not value.isfinite():
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert not value.isfinite()
    found = explain(model, loss, monitor.rows, step=step)
    assert found.startswith("inputs of blocks.")
    assert "at the start): try clamp=4, " in found
