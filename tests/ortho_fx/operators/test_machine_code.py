"""Registers of the GPU's kernels, as compiled for an H100 on a machine without one: nothing is spilled by default."""

import pytest
import torch

from ortho_fx.activations.expansion import make_activation
from ortho_fx.operators import parts
from tests.h100 import triton_code
from tests.kinds import COMPILED, config_of
from tests.ortho_fx.operators.expansions import LAST

pytest.importorskip("triton")

from tests.machine_code import compile_kernel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]

FLAT, IMAGES = (4096, 3072), (32, 384, 14, 14)
# The others are in benchmarks/h100_code.py.
CASES = [
    *((kind, "channel", FLAT, torch.float32) for kind in COMPILED),
    ("fourier", "channel", IMAGES, torch.bfloat16),
    ("tropical_rational", "layer", FLAT, torch.float32),
    ("tropical_rational", "layer", IMAGES, torch.bfloat16),
]


def code_of(kind, granularity, shape, dtype, degree=None):
    channel_dim = None if granularity == "layer" else -1 if shape == FLAT else 1
    channels = None if channel_dim is None else shape[channel_dim]
    activation = make_activation(
        config_of(kind, degree, granularity=granularity), channels=channels, channel_dim=channel_dim
    )
    x = torch.empty(shape, dtype=dtype, device="meta")
    if shape == IMAGES and granularity == "layer":
        x = x.to(memory_format=LAST)
    return triton_code(activation, x.requires_grad_())


@pytest.mark.parametrize(("kind", "granularity", "shape", "dtype"), CASES)
def test_nothing_is_spilled_at_default_degrees(kind, granularity, shape, dtype):
    code = code_of(kind, granularity, shape, dtype)
    for kernel in [*code.forward.big, *code.backward.big]:
        compiled = compile_kernel(kernel)
        assert not compiled.stack_bytes, (kernel.name, compiled.registers, compiled.stack_bytes)
        # Lanes that lie side by side in memory are read together.
        assert not (granularity == "channel" and shape == FLAT) or compiled.config["XBLOCK"] >= 16


def test_nothing_is_spilled_at_the_highest_degree_of_hermite():
    (kernel,) = code_of("hermite", "channel", FLAT, torch.float32, degree=32).backward.big
    assert not compile_kernel(kernel).stack_bytes


@pytest.mark.parametrize(
    ("numel", "terms", "column", "expected"),
    [
        (4096 * 3072, 4, False, [16384]),  # few terms
        (4096 * 3072, 4, True, [16384]),
        (4096 * 3072, 28, False, [16384]),  # many terms, and many sums all the same
        (1024 * 3072, 28, False, [6132, 16384]),
        (1024 * 3072, 28, True, [16384]),
        (float("inf"), 28, False, [16384]),  # symbolic
    ],
)
def test_length_of_partial_sums_on_a_gpu(numel, terms, column, expected):
    assert parts.largest_chunks("cuda", column, 1 if column else 64, terms, numel) == expected


def test_a_sum_without_a_loop_is_avoided():
    """1533 elements would be many sums, but the longest divisor below is too short for a loop."""
    assert parts.chunk("cuda", 1024, 1, 768, 28) == (16, 768)
    assert parts.chunk("cuda", 1024, 1, 3072, 28) == (1, 3072)
    assert parts.chunk("cuda", 1024, 1, 768, 4) == (16, 768)
