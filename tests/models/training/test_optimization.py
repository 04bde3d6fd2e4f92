import math

import pytest
import torch
from torch import nn

from ortho_fx.models.data.loader import load_validation
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.training.build import build
from ortho_fx.models.training.ema import MovingAverage
from ortho_fx.models.training.optimization import Optimization, learning_rate_scale
from ortho_fx.models.training.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


def test_learning_rate_rises_then_falls_to_its_floor():
    scales = [learning_rate_scale(step, 100, 10) for step in range(101)]
    assert scales[0] == pytest.approx(0.1)
    assert max(scales) == scales[9] == 1
    assert scales[100] == pytest.approx(0.1)
    assert learning_rate_scale(100, 100, 10, floor=0.0) == pytest.approx(0.0)
    assert learning_rate_scale(55, 100, 10, floor=0.0) == pytest.approx(0.5)
    assert learning_rate_scale(0, 1, 0) == 1


def test_weights_and_expansions_are_clipped_apart():
    config = TrainConfig(compile=False, batch_size=2, clip=1e-3, weight_decay=0.0)
    built = build(config)
    optimization = Optimization(built.model, config, ALONE)
    weights, expansions = optimization.clipped
    assert len(expansions) == 16
    assert len(weights) + len(expansions) == len(list(built.model.parameters()))
    taken = optimization.step(0, [built.data.batch(0, 0, 2)])
    for own in (weights, expansions):
        assert nn.utils.get_total_norm([p.grad for p in own]).item() == pytest.approx(1e-3, rel=1e-3)
    assert taken.gradient_norm > 1
    assert taken.lr == pytest.approx(config.lr / config.warmup)


def test_a_step_is_that_of_adamw_on_the_mean_of_the_micro_batches():
    config = TrainConfig(compile=False, batch_size=4, warmup=0, clip=math.inf, basis="none", beta2=0.9)
    built, reference = build(config), build(config)
    optimization = Optimization(built.model, config, ALONE)
    parts = [built.data.batch(0, 0, 4, rows) for rows in (slice(0, 2), slice(2, 4))]
    optimization.step(0, parts)
    inputs, targets = built.data.batch(0, 0, 4)
    nn.functional.cross_entropy(reference.model(inputs).flatten(0, -2), targets.flatten()).backward()
    decayed = [p for p in reference.model.parameters() if p.dim() == 2]
    others = [p for p in reference.model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.9)).step()
    # Adam's first step is the sign of the gradient. If the gradient is only rounding, so is the step.
    for ours, theirs in zip(built.model.parameters(), reference.model.parameters(), strict=True):
        agree = torch.isclose(ours, theirs, rtol=1e-3, atol=1e-5).float().mean()
        assert agree > 0.99


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("model", ["gpt2", "convnext"])
def test_expansions_learn_by_adamw_whatever_the_rest_does(optimizer, model):
    config = TrainConfig(model, compile=False, batch_size=2, optimizer=optimizer, warmup=0, expansion_lr=0.5)
    built = build(config)
    optimization = Optimization(built.model, config, ALONE)
    first, second = optimization.optimizers
    assert isinstance(first, {"adam": torch.optim.Adam, "muon": torch.optim.Muon}[optimizer])
    assert isinstance(second, torch.optim.AdamW)
    assert [group["lr"] for group in second.param_groups if group["name"] == "expansions"] == [0.5]
    taken = [id(p) for group in optimization.groups for p in group["params"]]
    assert sorted(taken) == sorted(map(id, built.model.parameters()))
    before = [p.detach().clone() for p in built.model.parameters()]
    optimization.step(0, [built.data.batch(0, 0, 2)])
    moved = [not torch.equal(p, old) for p, old in zip(built.model.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) // 2


def test_muon_is_for_hidden_matrices_alone():
    config = TrainConfig(compile=False, optimizer="muon", weight_decay=0.05)
    model = build(config).model
    muon, adamw = Optimization(model, config, ALONE).optimizers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (hidden,) = muon.param_groups
    own = sorted(names[id(parameter)] for parameter in hidden["params"])
    kinds = ("attention.projection", "attention.qkv", "mlp.expand", "mlp.projection")
    assert own == [f"blocks.{block}.{kind}.weight" for block in range(4) for kind in kinds]
    assert hidden["weight_decay"] == 0.05
    decayed = [names[id(p)] for group in adamw.param_groups if group["weight_decay"] for p in group["params"]]
    assert sorted(decayed) == sorted(n for n, p in model.named_parameters() if p.dim() == 2 and n not in own)


def test_expansions_have_a_floor_of_their_own():
    config = TrainConfig(compile=False, batch_size=2, steps=2, warmup=0, expansion_lr=1.0, expansion_min_lr=0.0)
    built = build(config)
    optimization = Optimization(built.model, config, ALONE)
    optimization.step(2, [built.data.batch(0, 0, 2)])
    rates = {group["name"]: group["lr"] for group in optimization.groups}
    assert rates == {"decay": pytest.approx(4e-4), "no_decay": pytest.approx(4e-4), "expansions": 0.0}


def test_an_evaluation_leaves_filler_out():
    config = TrainConfig(model="convnext", compile=False)
    built = build(config)
    optimization = Optimization(built.model, config, ALONE)
    built.model.eval()
    images, targets = next(load_validation(built.data, size=8))
    filled = targets.clone()
    filled[5:] = -100
    loss, correct, count = optimization.evaluate(images, filled).tolist()
    logits = built.model(images[:5])
    assert count == 5
    assert correct == (logits.argmax(-1) == targets[:5]).sum()
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, targets[:5], reduction="sum").item(), rel=1e-5)


def test_a_moving_average_follows_the_weights_and_gives_them_back():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    average = MovingAverage(model, decay=0.5)
    expected = 1.0
    for step, value in enumerate((2.0, 4.0, 8.0), 1):
        nn.init.constant_(model.weight, value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 8.0


@pytest.mark.parametrize(("count", "accumulate"), [(1, 1), (1, 3), (2, 2), (3, 2)])
def test_processes_and_micro_batches_share_all_rows(count, accumulate):
    parts = [Processes(rank, count, torch.device("cpu")).rows(12, accumulate) for rank in range(count)]
    assert all(len(rows) == accumulate for rows in parts)
    taken = sorted(row for rows in parts for part in rows for row in range(12)[part])
    assert taken == list(range(12))
