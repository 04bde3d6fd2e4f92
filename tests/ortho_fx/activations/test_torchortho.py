"""State dicts of torchortho, saved by benchmarks/torchortho_states.py: they load, and results agree."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, HermiteActivation, TropicalRationalActivation, rewrite_
from ortho_fx.activations.expansion import make_activation

FIXTURE = json.loads((Path(__file__).parent / "torchortho_states.json").read_text())
X = torch.tensor(FIXTURE["x"])
ROWS = {
    f"{row['title']}-{row['degree']}{''.join(f'-{setting}' for setting in row['settings'])}": row
    for row in FIXTURE["activations"]
}
CLAMPED = "HermiteActivation-3-clamp"


def state_of(name, prefix=""):
    return {f"{prefix}{key}": torch.tensor(value) for key, value in ROWS[name]["state"].items()}


def activation_for(name, **settings):
    return make_activation(ExpansionConfig(ROWS[name]["basis"], ROWS[name]["degree"]), **settings)


@pytest.mark.parametrize("name", [name for name in ROWS if name != CLAMPED])
def test_a_state_loads_and_computes_what_it_did(name):
    activation, expected = activation_for(name), torch.tensor(ROWS[name]["y"])
    assert not activation.load_state_dict(state_of(name)).missing_keys
    torch.testing.assert_close(activation(X), expected, rtol=2e-6, atol=2e-6)
    double = activation_for(name, dtype=torch.float64)
    double.load_state_dict(state_of(name))
    torch.testing.assert_close(double(X.double()).float(), expected, rtol=2e-6, atol=2e-6)
    assigned = activation_for(name)
    assigned.load_state_dict(state_of(name), assign=True)
    assert torch.equal(assigned(X), activation(X))
    assert all(isinstance(parameter, nn.Parameter) for parameter in assigned.parameters())


def test_states_inside_a_rewritten_model_load():
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Sequential(nn.GELU()))
    rewrite_(model, ExpansionConfig("fourier", 5))
    state = {
        **{key: value for key, value in model.state_dict().items() if key.startswith("0.")},
        **state_of("FourierActivation-5", "1."),
        **state_of("FourierActivation-5", "2.0."),
    }
    keys = set(state)
    model.load_state_dict(state)
    assert set(state) == keys
    assert "2.0.fundamental" in keys
    for activation in (model[1], model[2][0]):
        torch.testing.assert_close(activation(X), torch.tensor(ROWS["FourierActivation-5"]["y"]), rtol=2e-6, atol=2e-6)


def test_parameters_of_the_fitted_function_are_left_out():
    state = {**state_of("HermiteActivation-3"), "act_init.weight": torch.ones(1)}
    HermiteActivation(3).load_state_dict(state)


def test_a_state_of_degree_zero_is_a_size_mismatch():
    state = {"powers": torch.zeros(1, dtype=torch.int64), "coefficients": torch.ones(1)}
    activation = make_activation(ExpansionConfig("tropical", 1))
    with pytest.raises(RuntimeError, match="size mismatch for offsets"):
        activation.load_state_dict(state)


def test_frequencies_that_are_multiples_of_one_can_be_tied():
    config = ExpansionConfig("fourier", 5, tied=True)
    free, tied, state = activation_for("FourierActivation-5"), make_activation(config), state_of("FourierActivation-5")
    state["grid"] = 0.7 * torch.arange(1.0, 6.0)
    for activation in (free, tied):
        activation.load_state_dict(state)
    torch.testing.assert_close(tied(X), free(X))
    state["grid"][3] += 0.1
    message = "1.grid: the frequencies are no multiples of the first: load them with tied=False"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        nn.Sequential(nn.Identity(), tied).load_state_dict({f"1.{key}": value for key, value in state.items()})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("HermiteActivation-8", {}, "size mismatch for 1.coefficients: copying a param with shape torch.Size([9])"),
        (
            "FourierActivation-5",
            {},
            "1.fundamental: the state of torchortho's FourierActivation is one of basis 'fourier', not 'hermite'",
        ),
        (
            CLAMPED,
            {},
            "1.clamp.lim_val: no expansion equals one of 1.965 tanh(x / 2), so this state cannot be converted",
        ),
        ("HermiteActivation-3", {"1.slope": torch.ones(1)}, 'Unexpected key(s) in state_dict: "1.slope".'),
        ("HermiteActivation-3", {"1.coefficients": None}, 'Missing key(s) in state_dict: "1.coefficients".'),
    ],
)
def test_what_does_not_fit_is_named(name, change, message):
    model = nn.Sequential(nn.Identity(), HermiteActivation(3))
    state = {key: value for key, value in {**state_of(name, "1."), **change}.items() if value is not None}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model.load_state_dict(state)


def test_a_wrong_basis_is_refused_without_strict_as_well():
    # The coefficients have the same shape, so without a check they would load silently.
    activation = HermiteActivation(4)
    with pytest.raises(RuntimeError, match="not 'hermite'"):
        activation.load_state_dict(state_of("FourierActivation-5"), strict=False)


def test_missing_keys_of_a_state_are_missing_in_ours():
    state = state_of("TropicalRationalActivation-6")
    del state["powers_denom"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "denominator_slopes"\.'):
        TropicalRationalActivation(6).load_state_dict(state)
    state = state_of("TropicalActivation-5")
    del state["coefficients"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "offsets"\.'):
        activation_for("TropicalActivation-5").load_state_dict(state)
