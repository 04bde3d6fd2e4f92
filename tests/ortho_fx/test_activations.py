import copy
import pickle

import pytest
import torch

from ortho_fx import (
    FourierActivation,
    HermiteActivation,
    OrthoFxError,
    TropicalActivation,
    TropicalRationalActivation,
)

CLASSES = [HermiteActivation, FourierActivation, TropicalActivation, TropicalRationalActivation]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_are_those_of_the_input(cls, dtype):
    x = torch.randn(2, 3, 4).to(dtype)
    y = cls()(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert y.isfinite().all()


@pytest.mark.parametrize("cls", CLASSES)
def test_every_parameter_gets_a_gradient_that_is_not_zero(cls):
    activation = cls(dtype=torch.float64)
    activation(torch.randn(4096, dtype=torch.float64)).square().sum().backward()
    for name, parameter in activation.named_parameters():
        assert (parameter.grad != 0).all(), name


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_pickles_and_state_dicts_are_equal(cls):
    activation, x = cls(degree=4), torch.randn(16)
    for other in (copy.deepcopy(activation), pickle.loads(pickle.dumps(activation))):
        assert torch.equal(other(x), activation(x))
    fresh = cls(degree=4, init="paper")
    fresh.load_state_dict(activation.state_dict())
    assert torch.equal(fresh(x), activation(x))


@pytest.mark.parametrize("cls", CLASSES)
def test_meta_construction_then_materialisation(cls):
    activation = cls(device="meta").to_empty(device="cpu")
    activation.reset_parameters()
    x = torch.randn(16)
    assert torch.equal(activation(x), cls()(x))


def test_repr_names_degree_and_init():
    assert repr(HermiteActivation(degree=4)) == "HermiteActivation(degree=4, init='stable')"


def test_integers_are_refused_by_name():
    with pytest.raises(OrthoFxError, match=r"^HermiteActivation takes a floating-point tensor; got torch\.int64$"):
        HermiteActivation()(torch.arange(3))


def test_autocast_keeps_coefficients_in_float32():
    activation, linear = HermiteActivation(), torch.nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = activation(linear(torch.randn(4, 8)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert activation.coefficients.grad.dtype == torch.float32
