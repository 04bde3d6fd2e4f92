"""Inductor's kernels for an H100, generated without one, for functions whose kernels are known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.h100 import PROPERTIES, h100, triton_code

pytestmark = pytest.mark.slow


def empty(*shape, dtype=torch.float32, grad=True):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def shape_of(kernel):
    return kernel.kind, kernel.loads, kernel.stores, kernel.reductions


@pytest.mark.parametrize(
    ("shape", "dtype", "dynamic"),
    [
        ((4096, 3072), torch.float32, False),
        ((4096, 3072), torch.bfloat16, True),
        ((4099, 3071), torch.bfloat16, False),
        ((32, 197, 3072), torch.float32, True),
        ((7, 13, 17), torch.float32, False),
    ],
)
def test_gelu_is_one_pointwise_kernel_in_each_direction(shape, dtype, dynamic):
    x = empty(*shape, dtype=dtype)
    code = triton_code(F.gelu, x, dynamic=dynamic)
    (forward,), (backward,) = code.forward.kernels, code.backward.kernels
    assert shape_of(forward) == ("pointwise", 1, 1, 0)
    assert shape_of(backward) == ("pointwise", 2, 1, 0)
    assert code.forward.externs == code.backward.externs == ()
    for kernel in (forward, backward):
        assert kernel.numels == {"x": x.numel()}
        assert {(a.numel, a.dtype) for a in kernel.arguments} == {(x.numel(), dtype)}
        assert "multi_processor_count=132, cc=90" in kernel.definition
        assert (f"xnumel = {x.numel()}" in kernel.definition) != dynamic


def test_channels_last_stays_as_it_is():
    x = empty(32, 96, 14, 14, grad=False).to(memory_format=torch.channels_last).requires_grad_()
    code = triton_code(F.gelu, x)
    assert [shape_of(k) for k in code.backward.kernels] == [("pointwise", 2, 1, 0)]
    assert f"({96 * 14 * 14}, 1, {96 * 14}, 96)" in code.backward.source


@pytest.mark.smoke
def test_product_with_a_gate_fuses():
    code = triton_code(lambda x, gate: F.gelu(x) * gate, empty(4096, 3072), empty(4096, 3072))
    assert [shape_of(k) for k in code.forward.kernels] == [("pointwise", 2, 1, 0)]
    assert [shape_of(k) for k in code.backward.kernels] == [("pointwise", 3, 2, 0)]


def test_mlp_calls_cublas_around_its_kernels():
    hidden, up, bias, down = empty(4096, 768), empty(3072, 768), empty(3072), empty(768, 3072)
    code = triton_code(lambda x, *w: F.linear(F.gelu(F.linear(x, *w[:2])), w[2]), hidden, up, bias, down)
    assert code.forward.externs == ("extern_kernels.addmm", "extern_kernels.mm")
    assert [shape_of(k) for k in code.forward.kernels] == [("pointwise", 1, 1, 0)]
    assert code.backward.externs == ("extern_kernels.mm",) * 4
    # GELU's derivative, and the bias' gradient in two steps.
    assert [shape_of(k) for k in code.backward.big] == [("pointwise", 2, 1, 0), ("reduction", 1, 0, 1)]
    assert [k.numels["x"] for k in code.backward.small] == [3072]


def test_a_large_sum_takes_two_kernels_and_a_row_sum_one():
    whole = triton_code(torch.sum, empty(4096, 3072, grad=False))
    assert whole.backward is None
    assert [shape_of(k) for k in whole.forward.big] == [("reduction", 1, 0, 1)]
    assert [(k.kind, k.reductions) for k in whole.forward.small] == [("persistent_reduction", 1)]
    rows = triton_code(lambda x: x.sum(-1), empty(4096, 256, grad=False))
    (kernel,) = rows.forward.kernels
    assert shape_of(kernel) == ("persistent_reduction", 1, 0, 1)
    assert kernel.numels == {"x": 4096, "r0_": 256}


def test_softmax_of_long_rows_reads_them_twice():
    code = triton_code(lambda x: x.softmax(-1), empty(1024, 8192, grad=False))
    (kernel,) = code.forward.kernels
    assert (kernel.kind, [(a.loads, a.stores) for a in kernel.whole]) == ("reduction", [(2, 0), (0, 1)])


def test_parameters_and_buffers_of_a_module_are_taken_along():
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    code = triton_code(module, torch.empty(8, 3, 32, 32))
    assert "extern_kernels.convolution" in code.forward.externs
    assert "torch.ops.aten.convolution_backward.default" in code.backward.externs
    assert {p.device.type for p in module.state_dict().values()} == {"cpu"}


def test_whole_is_what_the_caller_says():
    weight = empty(3072)
    code = triton_code(torch.mul, weight, empty(4096, 3072), whole=4096 * 3072)
    (kernel,) = code.forward.kernels
    assert [a.numel for a in kernel.arguments] == [3072, 4096 * 3072, 4096 * 3072]
    assert (kernel.loads, kernel.stores) == (1, 1)


def test_what_the_function_sees_is_on_the_gpu():
    devices = []

    def function(x):
        devices.append((x.device.type, x.is_cuda))
        return x.relu()

    triton_code(torch.compiler.allow_in_graph(function), empty(8, grad=False))
    assert set(devices) == {("cuda", True)}


def test_what_cpp_code_makes_of_a_tensor_is_on_the_gpu():
    """`type_as` and the gradient of indexing get their device from the C++ object."""
    code = triton_code(lambda x, y: F.dropout(x.type_as(y), 0.1)[:, 3:], empty(64, 64, dtype=torch.half), empty(64, 64))
    assert "empty_strided_cpu(" not in code.forward.source + code.backward.source
    assert code.forward.externs == ("aten.randint.low_out",)


def test_autocast_is_refused():
    def function(x):
        with torch.autocast("cuda", torch.bfloat16):
            return x @ x

    with pytest.raises(RuntimeError, match="pass inputs of the dtypes"):
        triton_code(function, empty(64, 64))


def test_options_reach_inductor():
    kernels = [
        triton_code(torch.sum, empty(4096, 3072, grad=False), options={"split_reductions": split}).forward.kernels
        for split in (True, False)
    ]
    assert [len(k) for k in kernels] == [2, 1]


def test_errors_of_the_compiler_are_raised():
    uncompiled = torch.compiler.disable(F.relu)
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.disable"):
        triton_code(lambda x: uncompiled(x) + 1, empty(8))


def test_afterwards_nothing_believes_in_a_gpu():
    available, properties = torch.cuda.is_available(), torch.cuda.get_device_properties
    with h100():
        assert torch.cuda.get_device_properties() is PROPERTIES
    triton_code(F.gelu, empty(64, 64))
    assert torch.cuda.is_available() == available
    assert torch.cuda.get_device_properties is properties
    x = torch.randn(64, 64, requires_grad=True)
    y = torch.compile(F.gelu)(x)
    torch.testing.assert_close(y, F.gelu(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(F.gelu(x).sum(), x))
