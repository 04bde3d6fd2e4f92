"""The reference models have the published sizes and the published structure."""

import pytest
import torch

from ortho_fx import find_sites
from ortho_fx.models import convnext, gpt2


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("124m", 124_439_808), ("350m", 354_823_168), ("774m", 774_030_080), ("1.5b", 1_557_611_200)],
)
def test_gpt2_has_the_published_number_of_parameters(preset, parameters):
    with torch.device("meta"):
        model = gpt2.GPT2(gpt2.PRESETS[preset])
    assert count(model) == parameters
    assert model.head.weight is model.tokens.weight


@pytest.mark.parametrize(("preset", "parameters"), [("tiny", 842_496), ("small", 1_298_880), ("11m", 10_795_008)])
def test_the_sizes_of_gpt2_for_text_of_bytes(preset, parameters):
    with torch.device("meta"):
        assert count(gpt2.GPT2(gpt2.PRESETS[preset])) == parameters


@pytest.mark.parametrize(
    ("preset", "parameters"), [("t", 28_589_128), ("s", 50_223_688), ("b", 88_591_464), ("l", 197_767_336)]
)
def test_convnext_has_the_published_number_of_parameters(preset, parameters):
    with torch.device("meta"):
        model = convnext.ConvNeXt(convnext.PRESETS[preset])
    assert count(model) == parameters


def test_gpt2_sees_no_later_token():
    torch.manual_seed(0)
    model = gpt2.GPT2(gpt2.PRESETS["tiny"]).eval()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    a, b = model(tokens), model(changed)
    assert a.shape == (2, 16, 256)
    torch.testing.assert_close(a[:, :10], b[:, :10])
    assert not torch.allclose(a[:, 10], b[:, 10])


def test_convnext_drop_path_acts_in_training_only():
    torch.manual_seed(0)
    config = convnext.ConvNeXtConfig(1, 10, 1, (1, 2), (8, 16), drop_path=0.9, layer_scale=1.0)
    model, images = convnext.ConvNeXt(config), torch.randn(8, 1, 8, 8)
    assert model(images).shape == (8, 10)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_the_two_models_hold_both_kinds_of_activation():
    gelus = find_sites(gpt2.GPT2(gpt2.PRESETS["tiny"]))
    assert [(site.name, site.kind, site.function) for site in gelus] == [
        (f"blocks.{i}.mlp.act", "module", "gelu") for i in range(4)
    ]
    calls = find_sites(convnext.ConvNeXt(convnext.PRESETS["tiny"]))
    assert [(site.name, site.kind) for site in calls] == [
        (f"stages.{stage}.{block}.gelu_expansion_0", "function") for stage in (0, 1) for block in (2, 3)
    ]
