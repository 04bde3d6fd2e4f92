import warnings

import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, freeze_, rewrite_
from ortho_fx.rewriting import loading

ADVICE = (
    "ortho_fx: the state dict has expansions at 1, and this Sequential its own activations: call "
    "ortho_fx.rewrite_like_(model, state_dict) before model.load_state_dict(state_dict)"
)


def fresh() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))


def rewritten() -> nn.Sequential:
    model = fresh()
    rewrite_(model, "fourier3")
    return model


@pytest.mark.parametrize("as_plain_dict", [False, True])
def test_a_model_that_was_not_rewritten_is_told_what_to_call(as_plain_dict):
    state = dict(rewritten().state_dict()) if as_plain_dict else rewritten().state_dict()
    with pytest.raises(RuntimeError) as caught:
        fresh().load_state_dict(state)
    assert isinstance(caught.value, OrthoFxError)
    assert str(caught.value).startswith("Error(s) in loading state_dict for Sequential:\n\tUnexpected key(s)")
    assert str(caught.value).endswith(f"\n{ADVICE}")
    with pytest.warns(UserWarning, match="rewrite_like_") as told:
        fresh().load_state_dict(state, strict=False)
    assert [str(one.message) for one in told] == [ADVICE]


def test_frozen_expansions_too():
    model = rewritten()
    freeze_(model)
    with pytest.raises(OrthoFxError, match="has expansions at 1, and"):
        fresh().load_state_dict(model.state_dict())


def test_other_mistakes_are_pytorchs_own():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coefficients = nn.Parameter(torch.zeros(3))

    own = nn.Sequential(nn.Linear(8, 16), Own())
    for model, state in (
        (fresh(), {"3.weight": torch.zeros(2)}),
        (own, {"1.coefficients": torch.zeros(4)}),
        (rewritten(), fresh().state_dict()),
    ):
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state)
        assert not isinstance(caught.value, OrthoFxError)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh().load_state_dict({"3.weight": torch.zeros(2)}, strict=False)
        rewritten().load_state_dict(rewritten().state_dict())


def test_it_is_wrapped_once():
    before = nn.Module.load_state_dict
    loading.explain()
    assert nn.Module.load_state_dict is before


def test_a_state_dict_of_the_same_shapes_and_another_function_is_refused():
    first, last = (
        HermiteActivation(granularity="channel", channels=8, channel_dim=dim).state_dict() for dim in (1, -1)
    )
    model = nn.Sequential(HermiteActivation(granularity="channel", channels=8, channel_dim=-1))
    model[0].load_state_dict(last)
    with pytest.raises(RuntimeError, match="the state dict has channel_dim 1, and the model -1"):
        model[0].load_state_dict(first)
    state = model.state_dict()
    state._metadata["0"]["ortho_fx"]["basis"] = "chebyshev"
    with pytest.raises(RuntimeError, match="0: the state dict has basis 'chebyshev', and the model 'hermite'"):
        model.load_state_dict(state, strict=False)
    rewrite_(other := fresh(), ExpansionConfig("hermite"))
    other[1].load_state_dict({"coefficients": torch.zeros(4)})  # without metadata
