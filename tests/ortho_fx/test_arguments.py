"""What a user hands over by mistake is one sentence, not an error from the inside; and the model stays as it was."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import (
    Annealing,
    ExpansionConfig,
    HermiteActivation,
    OrthoFxError,
    calibrate_,
    export_onnx,
    export_program,
    find_sites,
    fit,
    freeze_,
    gains,
    param_groups,
    polynomial_report,
    revert_,
    rewrite_,
    to_polynomial,
)

X = torch.randn(4, 8)


def network():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU())


@pytest.mark.parametrize(
    "take",
    [
        find_sites,
        rewrite_,
        revert_,
        freeze_,
        lambda model: calibrate_(model, [X]),
        lambda model: param_groups(model, lr=1.0),
        lambda model: polynomial_report(model, [X]),
        lambda model: Annealing(model, batches=[X], steps=1),
        lambda model: export_program(model, X, "x.pt2"),
        lambda model: export_onnx(model, X, "x.onnx"),
    ],
)
def test_a_model_has_to_be_a_module(take):
    with pytest.raises(OrthoFxError, match=r"^the model must be a torch.nn.Module; got NoneType$"):
        take(None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExpansionConfig(basis=[]), "basis must be one of hermite, "),
        (lambda: ExpansionConfig(clamp=10**400), "clamp must be a finite number above zero, or None; got 1000"),
        (lambda: ExpansionConfig.from_dict(None), "expansion config must be a map of its fields; got NoneType"),
        (
            lambda: rewrite_(network(), {1: ExpansionConfig()}),
            "config must map names of sites, or patterns of",
        ),
        (lambda: rewrite_(network(), targets=5), "targets must be names of activation functions; got 5"),
        (lambda: fit("gelu"), "the function must be callable; got 'gelu'"),
        (lambda: fit(F.gelu, 5), "config must be an ExpansionConfig; got 5"),
        (lambda: fit(F.gelu, interval=5), "interval must be two finite numbers, the lower one first; got 5"),
        (
            lambda: fit(F.gelu, interval=("a", 1)),
            "interval must be two finite numbers, the lower one",
        ),
        (lambda: fit(lambda x: x + 0j), "<lambda> must return real floating-point numbers; got torch.complex128"),
        (lambda: fit(F.gelu, weight="measured", samples=[1, 2]), "samples must be a tensor; got list"),
        (lambda: gains(F.gelu, std="x"), "mean must be finite and std finite and above zero; got 0.0 and 'x'"),
        (lambda: gains(5), "the function must be callable; got 5"),
        (lambda: gains(nn.RReLU()), "the function is noisy or oscillates too fast for its gains to be computed"),
        (lambda: param_groups(network(), lr="x"), "lr must be a number, zero or more; got 'x'"),
        (lambda: HermiteActivation()(None), "HermiteActivation takes one tensor; got none"),
        (lambda: HermiteActivation()([1.0]), "HermiteActivation takes a tensor; got list"),
        (lambda: HermiteActivation()(torch.eye(3).to_sparse()), "HermiteActivation takes a dense tensor; got one of"),
        (lambda: HermiteActivation(granularity="channel", channels="8"), "channels must be an integer; got '8'"),
        (lambda: Annealing(network(), batches=[X], steps=1, reach="3"), "reach must be a number above zero; got '3'"),
        (
            lambda: to_polynomial(nn.Sequential(nn.Linear(2, 2), HermiteActivation(degree=2))).derivative(0.5),
            "input must be an integer from 0 to 1; got 0.5",
        ),
    ],
)
def test_a_wrong_argument_is_one_sentence(call, message):
    with pytest.raises(OrthoFxError, match=f"^{re.escape(message)}") as caught:
        call()
    assert "\n" not in str(caught.value)


class Interrupts(nn.Module):
    """The second of its calls is interrupted."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls, self.linear, self.act = error, [], nn.Linear(8, 8), nn.GELU()

    def forward(self, x):
        self.calls.append(1)
        if len(self.calls) == 2:
            raise self.error
        return self.act(self.linear(x))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("shapes"), OrthoFxError("inputs")])
def test_an_annealing_that_cannot_start_leaves_the_model_as_it_was(error):
    model = Interrupts(error)
    act = model.act
    with pytest.raises(type(error)):
        Annealing(model, batches=[X, X], steps=2)
    assert model.act is act


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("in_place", torch.zeros(1))
        self.register_buffer("anew", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.in_place += 1
        self.anew = self.anew + 1
        return F.gelu(self.linear(x))


@pytest.mark.slow
def test_an_export_leaves_buffers_that_count(tmp_path):
    model = Counts()
    rewrite_(model)
    in_place, anew = model.in_place, model.anew
    export_program(model, X, tmp_path / "model.pt2")
    assert model.in_place is in_place
    assert model.anew is anew
    assert (in_place.item(), anew.item()) == (0, 0)
