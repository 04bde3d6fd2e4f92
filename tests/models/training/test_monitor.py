"""Measurements of expansions agree with numpy on the same inputs, and the model does not change."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ortho_fx import ExpansionConfig, HermiteActivation, TropicalActivation, rewrite_
from ortho_fx.models import gpt2
from ortho_fx.models.training.monitor import SiteMonitor, expansions
from ortho_fx.models.weights.expansions import load_expansions


def small_model():
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), HermiteActivation(3), nn.Dropout(0.5), nn.Linear(16, 8), TropicalActivation(5)
    return nn.Sequential(*layers)


def captured(model, x):
    """Inputs and outputs of each expansion in eval mode, as numpy arrays."""
    seen, model = {}, model.eval()
    with torch.no_grad():
        for name, module in model.named_children():
            y = module(x)
            seen[name] = x.double().numpy(), y.double().numpy()
            x = y
    return {name: seen[name] for name in expansions(model)}


def test_statistics_are_those_of_numpy():
    model, x = small_model(), torch.randn(50, 8)
    rows = SiteMonitor(model).measure(lambda: model(x), 3)
    assert [row["site"] for row in rows] == ["1", "4"]
    for row, (inputs, outputs) in zip(rows, captured(model, x).values(), strict=True):
        expected = {
            "step": 3,
            "mean": inputs.mean(),
            "std": inputs.std(),
            "low": inputs.min(),
            "high": inputs.max(),
            "output_rms": np.sqrt((outputs**2).mean()),
            "drift": 0.0,
            "reach": abs(inputs - inputs.mean()).max() / inputs.std(),
        }
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_half_precision_is_reduced_in_single_and_double_in_double(dtype):
    activation = HermiteActivation(3, dtype=torch.float64)
    x = (torch.randn(40_000) * 0.1 + 3).to(dtype)
    (row,) = SiteMonitor(activation).measure(lambda: activation(x), 0)
    values = x.double().numpy()
    tolerance = 1e-5 if dtype == torch.bfloat16 else 1e-12
    assert row["mean"] == pytest.approx(values.mean(), rel=tolerance)
    assert row["std"] == pytest.approx(values.std(), rel=tolerance)


def test_a_shared_expansion_is_measured_over_all_its_calls():
    activation = HermiteActivation(3)
    parts = torch.randn(10), torch.randn(30) * 4 + 1
    (row,) = SiteMonitor(activation).measure(lambda: [activation(part) for part in parts], 0)
    both = torch.cat(parts).double().numpy()
    assert row["mean"] == pytest.approx(both.mean(), rel=1e-5)
    assert row["std"] == pytest.approx(both.std(), rel=1e-5)
    assert (row["low"], row["high"]) == (both.min(), both.max())


def test_the_model_and_the_random_numbers_are_left_alone():
    model, x = small_model().train(), torch.randn(5, 8)
    model[2].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    SiteMonitor(model).measure(lambda: model(x), 0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_when_the_model_fails():
    model = small_model()
    with pytest.raises(RuntimeError):
        SiteMonitor(model).measure(lambda: model(torch.ones(3, 7)), 0)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_drift_is_relative_to_the_start_and_buffers_have_none():
    model, x = small_model(), torch.randn(5, 8)
    monitor = SiteMonitor(model)
    monitor.measure(lambda: model(x), 0)
    start = model[1].coefficients.detach().clone()
    with torch.no_grad():
        model[1].coefficients += torch.tensor([0.0, 0.3, 0.0, -0.4])
        model[4].slopes += 1.0
    moved, unmoved = monitor.measure(lambda: model(x), 1)
    assert moved["drift"] == pytest.approx(0.5 / start.norm().item(), rel=1e-6)
    assert unmoved["drift"] == 0.0


def test_reach_is_in_deviations_of_the_first_measurement_also_after_a_resumption():
    activation = HermiteActivation(3)
    first = SiteMonitor(activation)
    rows = first.measure(lambda: activation(torch.tensor([1.0, 3.0])), 0)
    second = SiteMonitor(activation)
    second.resume(rows)
    for monitor in (first, second):
        (row,) = monitor.measure(lambda: activation(torch.tensor([-5.0, 9.0])), 1)
        assert row["reach"] == pytest.approx(7.0)
        assert [row["step"] for row in monitor.rows] == [0, 1]


def test_what_is_not_finite_is_measured_as_such():
    activation = HermiteActivation(3)
    (row,) = SiteMonitor(activation).measure(lambda: activation(torch.tensor([1.0, float("nan"), 2.0])), 0)
    assert np.isnan([row["mean"], row["std"], row["low"], row["high"], row["output_rms"]]).all()


def test_an_untouched_model_and_an_expansion_that_is_not_called_have_no_row(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    assert SiteMonitor(model).measure(lambda: model(torch.ones(1, 2)), 0) == []
    model.add_module("unused", HermiteActivation(3))
    monitor = SiteMonitor(model)
    assert monitor.measure(lambda: model[:2](torch.ones(1, 2)), 0) == []
    monitor.save_expansions(tmp_path / "expansions.safetensors", 0)
    assert load_expansions(tmp_path / "expansions.safetensors").sites["unused"].inputs is None


def test_a_compiled_model_is_measured_and_does_not_compile_again():
    model, x = small_model().train(), torch.randn(5, 8)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(x)
    monitor = SiteMonitor(compiled)
    rows = monitor.measure(lambda: compiled(x), 0)
    compiled(x)
    assert [row["site"] for row in rows] == ["1", "4"]
    assert len(compilations) == 1


def test_names_and_numbers_are_the_same_when_the_model_is_distributed(process_group):
    def measured(wrap):
        model, x = small_model(), torch.linspace(-1, 1, 40).reshape(5, 8)
        model = wrap(model)
        monitor = SiteMonitor(model)
        monitor.measure(lambda: model(x), 0)
        for _, activation in sorted(expansions(model).items()):
            with torch.no_grad():
                for parameter in activation.parameters():
                    parameter.mul_(1.5)
        return monitor.measure(lambda: model(x), 1), monitor

    from torch.distributed.fsdp import fully_shard

    alone, _ = measured(lambda model: model)
    for wrap in (DistributedDataParallel, fully_shard):
        rows, monitor = measured(wrap)
        assert rows == alone
        assert alone[0]["drift"] == pytest.approx(0.5)
        assert [type(value) for held in monitor._now.values() for value in held.values()] == [torch.Tensor] * 3


def test_the_density_is_of_every_channel_and_of_the_inputs_range(tmp_path):
    torch.manual_seed(0)
    # A sample of every 64th number would see only one channel of 64.
    x = torch.randn(16384, 64) + 8.0 * (torch.arange(64) % 2)
    activation = HermiteActivation(3)
    monitor = SiteMonitor(activation)
    monitor.measure(lambda: activation(x), 7)
    monitor.save_expansions(tmp_path / "e.safetensors", 7)
    inputs = load_expansions(tmp_path / "e.safetensors").sites[""].inputs
    middles = (inputs.edges[1:] + inputs.edges[:-1]) / 2
    width = inputs.edges[1] - inputs.edges[0]
    assert inputs.density.sum() * width == pytest.approx(1, abs=0.01)
    assert inputs.density[middles < 4].sum() * width == pytest.approx(0.5, abs=0.02)
    assert inputs.edges[0] < -2.5
    assert inputs.edges[-1] > 10.5


def test_the_file_holds_the_activations_as_they_were_measured(tmp_path):
    torch.manual_seed(0)
    model = gpt2.GPT2(gpt2.GPT2Config(vocabulary=64, context=8, layers=2, heads=2, width=16))
    tokens = torch.randint(0, 64, (2, 8))
    rewrite_(model, ExpansionConfig("hermite"), example_inputs=tokens)
    monitor = SiteMonitor(model)
    monitor.save_expansions(tmp_path / "start.safetensors", 0)
    with torch.no_grad():
        model.blocks[1].mlp.act.coefficients.add_(0.25)
    rows = monitor.measure(lambda: model(tokens), 5)
    expected = model.blocks[1].mlp.act.coefficients.detach().clone()
    with torch.no_grad():
        model.blocks[1].mlp.act.coefficients.zero_()
    monitor.save_expansions(tmp_path / "now.safetensors", 5)
    start, now = (load_expansions(tmp_path / f"{name}.safetensors") for name in ("start", "now"))
    assert (start.step, now.step) == (0, 5)
    assert list(now.sites) == ["blocks.0.mlp.act", "blocks.1.mlp.act"]
    assert torch.equal(now.sites["blocks.1.mlp.act"].activation.coefficients, expected)
    torch.testing.assert_close(start.sites["blocks.1.mlp.act"].activation.coefficients.data, expected - 0.25)
    assert now.sites["blocks.1.mlp.act"].inputs.std == rows[1]["std"]
    assert start.sites["blocks.1.mlp.act"].inputs is None


def test_coefficients_are_those_of_the_last_measurement_and_stay_few():
    model, x = small_model(), torch.randn(50, 8)
    monitor = SiteMonitor(model)
    monitor.measure(lambda: model(x), 1)
    with torch.no_grad():
        model[1].coefficients.add_(1 / 3)
    before = monitor.coefficients(1)
    monitor.measure(lambda: model(x), 2)
    rows = monitor.coefficients(2)
    assert [(row["step"], row["site"]) for row in rows] == [(2, "1"), (2, "4")]
    for row in rows:
        module = model.get_submodule(row["site"])
        assert row["parameters"].keys() == dict(module.named_parameters()).keys()
        for name, parameter in module.named_parameters():
            assert torch.equal(torch.tensor(row["parameters"][name]), parameter)  # nine digits are all of float32
    assert before[0]["parameters"] != rows[0]["parameters"]
    many = HermiteActivation(3, granularity="channel", channels=1025, channel_dim=-1)
    assert SiteMonitor(nn.Sequential(many, HermiteActivation(2))).coefficients(0)[0]["site"] == "1"
