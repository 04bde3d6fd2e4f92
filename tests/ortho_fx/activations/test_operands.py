"""What an expansion is computed with lies where its input lies; the rest is an error that names its site."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.testing import assert_close

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, freeze_, rewrite_
from ortho_fx.bases import BASES
from ortho_fx.errors import OperandError

META = (
    "is on the meta device, without values, and its input on cpu: load them, or call to_empty(device=...) and "
    "reset_parameters()"
)


def rewritten(config=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    rewrite_(model, config or ExpansionConfig("hermite", 3))
    return model


def error_of(call, *arguments):
    with pytest.raises(OperandError) as caught:
        call(*arguments)
    assert isinstance(caught.value, OrthoFxError)
    assert isinstance(caught.value, RuntimeError)  # as what PyTorch's own operators raise
    return str(caught.value)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("frozen", [False, True], ids=["learned", "frozen"])
def test_parameters_that_assign_leaves_without_values(basis, frozen):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    rewrite_(model, ExpansionConfig(basis))
    x = torch.randn(2, 4)
    assert model(x.to("meta")).is_meta
    if frozen:
        whole = rewritten(ExpansionConfig(basis))
        freeze_(whole)
        model[1] = whole[1].to("meta")
    weights = {name: value for name, value in rewritten().state_dict().items() if not name.startswith("1.")}
    model.load_state_dict(weights, assign=True, strict=False)
    first = next(name for name, tensor in model[1].state_dict().items())
    name = BASES[basis].parameters[0].name if not frozen else first
    assert error_of(model, x) == f"1: {name} {META}"
    if not frozen:
        model[1].to_empty(device="cpu")
        model[1].reset_parameters()
        assert_close(model(x), rewritten(ExpansionConfig(basis))(x))


def test_every_mode_of_running_finds_them():
    model, x = rewritten(), torch.randn(2, 4)
    traced, program = torch.fx.symbolic_trace(model), torch.export.export(model, (x,)).module()
    stateless = {name: p.to("meta") if name.startswith("1.") else p for name, p in model.named_parameters()}
    told = f"1: coefficients {META}"
    assert error_of(functional_call, model, stateless, (x,)) == told
    for whole in (model, traced, program):
        whole.get_submodule("1").to("meta")
    assert error_of(model, x) == told
    assert error_of(vmap(model), torch.randn(3, 2, 4)) == told
    with pytest.raises(OrthoFxError):
        torch.export.export(model, (x,))
    for graph in (traced, program):
        assert error_of(graph, x) == f"ortho_fx.hermite: coefficients {META}"
    with torch.no_grad():
        assert error_of(model, x) == told


@pytest.mark.slow
def test_compiled_models_find_them_while_they_are_traced():
    model, x = rewritten(), torch.randn(2, 4)
    model[1].to("meta")
    assert error_of(torch.compile(model, backend="eager"), x) == f"1: coefficients {META}"


def test_operators_find_them_in_both_directions():
    x, meta = torch.randn(3), torch.zeros(4, device="meta")
    forward, backward = torch.ops.ortho_fx.hermite, torch.ops.ortho_fx.hermite_backward
    assert error_of(forward, x, meta) == f"ortho_fx.hermite: coefficients {META}"
    assert error_of(backward, x, x, meta) == f"ortho_fx.hermite_backward: coefficients {META}"
    assert (
        error_of(forward, x.to("meta"), torch.zeros(4))
        == "ortho_fx.hermite: coefficients is on cpu and its input on meta"
    )
    assert forward(x.to("meta"), meta).is_meta


def test_an_input_on_another_device():
    assert error_of(rewritten()[1], torch.zeros(2, device="meta")) == "1: coefficients is on cpu and its input on meta"
    clamped = HermiteActivation(clamp=2.0)
    clamped.bounds = clamped.bounds.to("meta")
    assert error_of(clamped, torch.zeros(2)) == f"HermiteActivation: bounds {META}"


def test_storage_dtypes():
    x, told = torch.randn(2, 4), "1 computes with float16, bfloat16, float32 and float64; "
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64):
        model = rewritten()
        model[1].to(dtype)
        assert error_of(model, x) == f"{told}coefficients is {dtype}"
    assert error_of(rewritten()[1], x.to(torch.float8_e5m2)) == f"{told}its input is torch.float8_e5m2"
    # Neighbours that only store give their place, not their dtype.
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16).to(torch.float8_e4m3fn), nn.GELU())
    rewrite_(model)
    assert model[1].coefficients.dtype == torch.get_default_dtype()
    model = nn.Sequential(nn.Linear(4, 4).to(torch.float8_e4m3fn), nn.GELU(), nn.LayerNorm(4, dtype=torch.bfloat16))
    rewrite_(model)
    assert model[1].coefficients.dtype == torch.bfloat16


def test_names_of_sites_travel_with_copies_and_stay_out_of_the_state():
    model = rewritten()
    assert [key for key in model.state_dict() if key.startswith("1.")] == ["1.coefficients"]
    twin = copy.deepcopy(model)
    freeze_(twin)
    assert model[1].site == twin[1].site == "1"
    assert HermiteActivation().site == ""


@pytest.mark.slow
def test_an_error_of_dynamos_tells_ours():
    model, x = rewritten(), torch.randn(2, 4)
    model[1].to("meta")
    for whole in (
        torch.compile(model, backend="aot_eager", fullgraph=True),
        lambda x: torch.export.export(model, (x,), strict=True),
    ):
        with pytest.raises(RuntimeError, match="1: coefficients is on the meta device"):
            whole(x)
    # With graph breaks allowed, Dynamo leaves the expansion to Python.
    assert error_of(torch.compile(model, backend="aot_eager"), x) == f"1: coefficients {META}"
