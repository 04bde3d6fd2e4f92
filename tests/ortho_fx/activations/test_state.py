"""State dicts of activations that stand in several places, and averaged copies."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import swa_utils
from torch.testing import assert_close

from ortho_fx import ExpansionConfig, freeze_, rewrite_

CONFIG = ExpansionConfig("tropical", 3, clamp=2.0)  # with buffers


def shared(config=CONFIG):
    torch.manual_seed(0)
    act = nn.GELU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Sequential(nn.Linear(4, 4), act), act)
    rewrite_(model, config)
    with torch.no_grad():
        model[1].offsets.add_(torch.randn(4))
    return model


class Same(nn.Module):
    def forward(self, a):
        return a


@pytest.mark.parametrize("kind", ["learned", "frozen", "parametrized"])
def test_every_place_has_tensors_of_its_own(kind, tmp_path):
    model = shared()
    if kind == "frozen":
        freeze_(model)
    if kind == "parametrized":
        parametrize.register_parametrization(model[1], "offsets", Same())
    for _ in range(2):
        state = model.state_dict()
        assert len({value.data_ptr() for value in state.values()}) == len(state)
        save_file(state, tmp_path / "model.safetensors")
    first = [key.removeprefix("1.") for key in state if key.startswith("1.")]
    assert len(state) == 4 + 3 * len(first)
    for name in first:
        assert torch.equal(state[f"1.{name}"], state[f"2.1.{name}"])
        assert torch.equal(state[f"1.{name}"], state[f"3.{name}"])
        # As ever, a state dict holds the parameters themselves, and all of them if they are asked for.
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        assert state[f"1.{name}"].data_ptr() == own[f"1.{name}"].data_ptr()
        kept = model.state_dict(keep_vars=True)
        assert kept[f"1.{name}"] is kept[f"3.{name}"]

    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.zero_()
    for assign in (False, True):
        fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True, assign=assign)
        x = torch.randn(3, 4)
        assert_close(fresh(x), model(x))
        assert fresh[1] is fresh[3] is fresh[2][1]
    assert [key for key in model[1].state_dict()] == first


def test_states_of_one_model_are_not_taken_for_those_of_another():
    model = shared()
    act = model[1]
    other = nn.Sequential(act, nn.Sequential(act))
    for whole in (model, other, model, nn.Sequential(nn.Identity(), act)):
        state = whole.state_dict()
        own = {key: value for key, value in state.items() if key.endswith("offsets")}
        first = next(iter(own.values()))
        assert first.data_ptr() == act.offsets.data_ptr()
        assert len({value.data_ptr() for value in own.values()}) == len(own)


def test_averages_made_after_the_rewrite_follow_the_model():
    for multi in (None, swa_utils.get_ema_multi_avg_fn(0.5)):
        model, x = shared(), torch.randn(3, 4)
        average = swa_utils.AveragedModel(model, multi_avg_fn=multi, use_buffers=True)
        average.update_parameters(model)
        assert_close(average(x), model(x))
        first = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        for mean, one, other in zip(average.module.parameters(), first, model.parameters(), strict=True):
            assert_close(mean.detach(), (one + other.detach()) / 2)
        assert average.module[1] is average.module[3]
        swa_utils.update_bn([x], average)
