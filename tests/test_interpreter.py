"""The interpreter of generated GPU code: it is right for known functions, and it finds faults in the code."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.h100 import triton_code
from tests.interpreter import run

pytestmark = pytest.mark.slow


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


FUNCTIONS = {
    "pointwise": lambda x: F.gelu(x),
    "softmax": lambda x: x.softmax(-1),
    "column sums": lambda x: x * x.square().sum(0),
    "sum": lambda x: x * x.sin().sum(),
    "transposed": lambda x: (x.t().contiguous().cos() + 1).t(),
    "product": lambda x: x @ x.t(),
    "joined": lambda x: torch.cat([x.exp(), -x[:3]]),
}


@pytest.mark.parametrize("shape", [(48, 64), (37, 129)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name, shape):
    function, x = FUNCTIONS[name], noise(*shape).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    expected = function(exact_x)
    tangent = noise(*expected.shape, seed=1)
    (y,), (gradient,) = run(triton_code(function, x), [x], [tangent])
    (expected_gradient,) = torch.autograd.grad(expected, exact_x, tangent.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)


def test_half_precision_is_rounded_once():
    x = noise(48, 64, dtype=torch.bfloat16)
    (y,), _ = run(triton_code(torch.sin, x), [x], [x])
    assert torch.equal(y, x.float().sin().bfloat16())


def test_parameters_and_buffers_of_a_module():
    model, x, tangent = (
        nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16).eval(), nn.SiLU()),
        noise(8, 64),
        noise(8, 16),
    )
    (y,), gradients = run(triton_code(model, x), [x, *model.parameters(), *model.buffers()], [tangent])
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(model(x), list(model.parameters()), tangent)
    torch.testing.assert_close(gradients[1 : 1 + len(expected)], list(expected), rtol=1e-4, atol=1e-5)


def changed(code, old, new):
    """The code with `old` replaced by `new` in its forward kernels."""
    assert any(old in kernel.definition for kernel in code.forward.kernels)
    kernels = tuple(
        dataclasses.replace(kernel, definition=kernel.definition.replace(old, new)) for kernel in code.forward.kernels
    )
    return dataclasses.replace(code, forward=dataclasses.replace(code.forward, kernels=kernels))


def test_an_access_outside_of_a_tensor_is_an_error():
    x = noise(37, 129)
    code = changed(triton_code(torch.sin, x), "xmask = xindex < xnumel", "xmask = xindex < xnumel + 1")
    with pytest.raises(AssertionError, match=r"in_ptr0 has 4773 elements, and \[4773\] are meant"):
        run(code, [x], [x])


def test_what_is_not_written_is_nan():
    x = noise(37, 129)
    code = changed(triton_code(torch.sin, x), "xmask = xindex < xnumel", "xmask = xindex < xnumel - 1")
    (y,), _ = run(code, [x], [x])
    assert y.flatten()[-1].isnan()
    assert torch.equal(y.flatten()[:-1], x.sin().flatten()[:-1])


def test_a_function_of_triton_that_is_not_known_is_an_error():
    x = noise(37, 129)
    with pytest.raises(AttributeError, match="no_such_function"):
        run(changed(triton_code(torch.sin, x), "tl_math.sin", "tl_math.no_such_function"), [x], [x])
