"""`report.check`: findings from running a rewritten model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, OrthoFxError, revert_, rewrite_

FIT = ExpansionConfig("tropical_rational", 8, "fit")


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act, self.forgotten = nn.Linear(4, 4), nn.GELU(), nn.SiLU()

    def forward(self, x):
        x = self.act(self.linear(x))
        return F.relu(x) if self.training else x


def test_expansions_that_nobody_calls_or_one_mode_alone_are_named():
    model = Branches().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check = rewrite_(model, FIT).check(torch.randn(3, 4))
    assert check.calls["act"] == {"train": 1, "eval": 1}
    assert check.uncalled == ("forgotten",)
    assert check.only_in == {"relu_expansion_0": "train"}
    assert not check.passed
    assert str(check).splitlines() == [
        "forgotten: never called with these inputs",
        "relu_expansion_0: called in train mode only",
        "2 of 3 expansions called",
    ]
    assert model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


class Reader(nn.Module):
    """Reads a tensor after an in-place activation in a child changed it."""

    def __init__(self, again):
        super().__init__()
        self.act, self.other, self.again = nn.ReLU(inplace=True), nn.ReLU(inplace=True), again

    def forward(self, x):
        x = x + 1
        kept = [x]  # a list is no name that the search follows
        y = self.act(x)
        y = y - kept[0] if self.again else y * 2
        return self.other(y)


@pytest.mark.parametrize("again", [True, False])
def test_a_changed_input_that_is_read_again_is_named(again):
    check = rewrite_(Reader(again), FIT).check(torch.randn(5, 4))
    assert check.mutations == (("act",) if again else ())
    assert check.passed is not again


def test_the_fused_path_of_a_transformer_layer_is_left():
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    check = rewrite_(layer, FIT).check((torch.randn(2, 3, 8),))
    assert check.passed
    assert all(counts == {"train": 1, "eval": 1} for counts in check.calls.values())


def test_batches_are_run_as_they_are_called():
    model = Branches()
    report = rewrite_(model, FIT)
    for inputs in (torch.randn(2, 4), (torch.randn(2, 4),), {"x": torch.randn(2, 4)}):
        assert report.check(inputs).calls["act"]["eval"] == 1


def test_outputs_that_are_not_finite_are_told():
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    report = rewrite_(model)
    with torch.no_grad():
        model[1].coefficients.fill_(torch.inf)
    assert "the outputs are not finite" in str(report.check(torch.randn(2, 2)))


def test_a_model_that_was_put_back_has_nothing_to_check():
    model = Branches()
    report = rewrite_(model)
    revert_(model)
    with pytest.raises(OrthoFxError, match=r"^Branches holds no expansion to check: call rewrite_ first$"):
        report.check(torch.randn(2, 4))


class ChangingLeaf(nn.Module):
    def forward(self, x):
        return x.relu_()


def test_a_module_of_somebodys_that_works_in_place_is_named():
    model = Reader(True)
    model.act = ChangingLeaf()
    assert rewrite_(model, FIT).check(torch.randn(5, 4)).mutations == ("act",)
