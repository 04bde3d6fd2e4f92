import pytest
import torch
from torch import nn

from ortho_fx import OrthoFxError, param_groups, rewrite_


def test_weights_decay_and_nothing_else():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4, 2))
    tied = model[4]
    model.append(tied)
    model[0].bias.requires_grad_(False)
    rewrite_(model)
    groups = {group["name"]: group for group in param_groups(model, lr=1e-3, weight_decay=0.1, expansion_lr=1e-2)}
    settings = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert settings == {"decay": (1e-3, 0.1), "no_decay": (1e-3, 0.0), "expansions": (1e-2, 0.0)}
    members = {name: {id(p) for p in group["params"]} for name, group in groups.items()}
    assert members["decay"] == {id(model[0].weight), id(model[4].weight)}
    assert members["no_decay"] == {id(model[1].weight), id(model[1].bias), id(model[4].bias)}
    assert members["expansions"] == {id(model[2].coefficients)}
    torch.optim.AdamW(groups.values())


def test_empty_groups_are_dropped_and_wrong_rates_named():
    assert [group["name"] for group in param_groups(nn.Linear(2, 2, bias=False), lr=0.1)] == ["decay"]
    with pytest.raises(OrthoFxError, match=r"^expansion_lr must be a number, zero or more; got -1$"):
        param_groups(nn.Linear(2, 2), lr=0.1, expansion_lr=-1)
