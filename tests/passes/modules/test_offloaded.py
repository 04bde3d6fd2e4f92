"""Models that accelerate has offloaded; its hooks are stood for by what they are told by."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, OrthoFxError, calibrate_, gains, rewrite_


def hook(**more):
    return SimpleNamespace(offload=True, execution_device="cpu", place_submodules=False, **more)


def offloaded(owner_hook, layer_hook):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, dtype=torch.float64), nn.GELU())
    model[0].to("meta")
    model._hf_hook, model[0]._hf_hook = owner_hook, layer_hook
    return model


@pytest.mark.parametrize("in_sequence", [False, True])
def test_parameters_stay_where_their_neighbours_are_computed(in_sequence):
    layer_hook = hook()
    if in_sequence:
        layer_hook = SimpleNamespace(hooks=[SimpleNamespace(no_grad=True), layer_hook])
    model = offloaded(None, layer_hook)
    rewrite_(model, ExpansionConfig("hermite", 8, "fit"))
    assert model[1].coefficients.device.type == "cpu"
    assert model[1].coefficients.dtype == torch.float64
    x = torch.randn(100, dtype=torch.float64)
    assert (model[1](x) - nn.functional.gelu(x)).abs().max() < 0.1


def test_models_that_wait_for_their_weights_keep_waiting():
    for kept in (
        None,
        SimpleNamespace(offload=False, execution_device="cpu"),
        SimpleNamespace(offload=True, execution_device=None),
    ):
        model = offloaded(None, kept)
        rewrite_(model)
        assert model[1].coefficients.is_meta


def test_what_is_offloaded_later_is_not_calibrated():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU())
    rewrite_(model, "hermite")
    coefficients = model[1].coefficients
    model[1].to("meta")

    def load(module, args):
        module.coefficients = nn.Parameter(coefficients.detach())

    def unload(module, args, output):
        module.to("meta")

    model[1].register_forward_pre_hook(load)
    model[1].register_forward_hook(unload)
    model(torch.randn(8, 4))
    told = r"^the parameters of 1 are on the meta device between the calls: calibrate before offloading$"
    with pytest.raises(OrthoFxError, match=told):
        calibrate_(model, [torch.randn(8, 4)])
    with pytest.raises(OrthoFxError, match=r"^1: coefficients is on the meta device, without values$"):
        gains(model[1])


def test_a_hook_that_loads_all_weights_by_name_is_refused():
    whole = hook()
    whole.place_submodules = True
    model = offloaded(whole, None)
    before = model[1]
    told = (
        r"^1: Sequential is offloaded as a whole, and its hook has no weights for new parameters: call rewrite_ before "
        r"offloading$"
    )
    with pytest.raises(OrthoFxError, match=told):
        rewrite_(model)
    assert model[1] is before
