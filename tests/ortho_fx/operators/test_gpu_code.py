"""The code that Inductor generates for an H100, on a machine without one: it is not built."""

import math

import pytest
import torch
from torch import nn

from tests.h100 import triton_code
from tests.ortho_fx.operators.expansions import AROUND, LAST, Around, every_basis, expansion

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]

BIG = (4096, 3072)


def empty(*shape, dtype=torch.bfloat16, layout=torch.contiguous_format):
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout).requires_grad_()


def gpu_code(activation, *inputs, around="alone", **keywords):
    return triton_code(Around(activation, AROUND[around][0]), *inputs, **keywords)


def small_kernels(basis, parameters=torch.float32):
    """The most kernels that a backward may have for its sums; a rational reorders its lines and casts gradients too."""
    return 2 + (basis == "tropical_rational") * (1 if parameters == torch.float32 else 2)


def assert_one_pass(code, basis, loads=2, stores=1, forward=1):
    """Asserts one kernel over the tensor in each direction that touches each element once, and few for the sums."""
    (kernel,) = code.forward.big
    assert (kernel.kind, kernel.loads, kernel.stores) == ("pointwise", forward, 1), str(code)
    (kernel,) = code.backward.big
    assert sorted((a.loads, a.stores) for a in kernel.whole) == [(0, 1)] * stores + [(1, 0)] * loads, str(code)
    assert len(code.backward.small) <= small_kernels(basis), str(code)


@pytest.mark.parametrize(
    "x",
    [
        empty(*BIG, dtype=torch.float32),
        empty(*BIG),
        empty(32, 197, 3072),
        empty(4099, 3071),
        empty(32, 384, 14, 14, layout=LAST),
    ],
    ids=["float32", "bfloat16", "batches", "odd", "channels last"],
)
@every_basis
def test_gpu_code_passes_over_the_tensor_once(basis, x):
    assert_one_pass(gpu_code(expansion(basis), x), basis)


@every_basis
def test_gpu_code_of_a_gated_product(basis):
    code = gpu_code(expansion(basis), empty(*BIG), empty(*BIG), around="gate")
    assert_one_pass(code, basis, loads=3, stores=2, forward=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_basis
def test_gpu_code_of_an_mlp_is_that_of_gelu_and_few_kernels_for_the_sums(basis, dtype):
    def code(activation):
        model = nn.Sequential(nn.Linear(768, 3072), activation, nn.Linear(3072, 768)).to(dtype)
        return triton_code(model, empty(4096, 768, dtype=dtype), whole=math.prod(BIG))

    ours, gelu = code(expansion(basis)), code(nn.GELU())
    assert [(k.kind, k.loads, k.stores) for k in ours.forward.big] == [("pointwise", 1, 1)]
    assert ours.backward.externs == gelu.backward.externs
    # One of these kernels computes the gradient of the bias.
    assert [(k.loads, k.stores) for k in ours.backward.big] == [(k.loads, k.stores) for k in gelu.backward.big]
    assert len(ours.backward.small) <= len(gelu.backward.small) + small_kernels(basis, dtype), str(ours)


@pytest.mark.parametrize(("basis", "degree"), [("hermite", 16), ("tropical", 16), ("hermite", 32)])
def test_gpu_code_of_high_degrees(basis, degree):
    assert_one_pass(gpu_code(expansion(basis, degree), empty(*BIG)), basis)


@pytest.mark.parametrize(
    ("granularity", "channels", "x"),
    [
        ("channel", 3072, empty(*BIG)),
        ("channel", 384, empty(32, 384, 14, 14)),
        ("channel", 384, empty(32, 384, 14, 14, layout=LAST)),
        ("group:4", 3072, empty(*BIG)),
    ],
    ids=["channels", "channels of images", "channels last", "groups"],
)
@pytest.mark.parametrize("basis", ["hermite", "fourier"])
def test_gpu_code_of_groups(basis, granularity, channels, x):
    assert_one_pass(gpu_code(expansion(basis, 3, granularity, channels), x), basis)


@pytest.mark.parametrize("basis", ["hermite", "tropical"])
def test_gpu_code_of_sizes_that_are_not_known(basis):
    assert_one_pass(gpu_code(expansion(basis), empty(*BIG), dynamic=True), basis)
