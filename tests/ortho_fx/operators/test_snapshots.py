"""The kernels of every basis at its default degree, written down: a change of them is to be seen, and chosen.

A row has the small kernels, and in parentheses the loads and stores of whole tensors in each big one; forward, then
backward. EXPECTTEST_ACCEPT=1 writes the tables anew.
"""

import pytest
import torch
from expecttest import assert_expected_inline

from ortho_fx import torch_private
from ortho_fx.bases import BASES
from tests.h100 import triton_code
from tests.ortho_fx.operators.expansions import expansion, noise
from tests.ortho_fx.operators.test_cpu_code import cpu_code

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_compiler"),
    # Other releases fuse a few small kernels otherwise.
    pytest.mark.skipif(torch_private.release() != torch_private.TESTED[-1], reason="the tables are of another release"),
]

ROWS, CHANNELS = 512, 768


def on_cpu(activation):
    for graph in cpu_code(activation, noise(ROWS, CHANNELS).requires_grad_()):
        over = graph.over(ROWS * CHANNELS)
        yield len(graph.nests) - len(over), over


def on_gpu(activation):
    x = torch.empty(ROWS, CHANNELS, dtype=torch.bfloat16, device="meta", requires_grad=True)
    code = triton_code(activation, x)
    for graph in (code.forward, code.backward):
        yield len(graph.small), [(kernel.loads, kernel.stores) for kernel in graph.big]


def table(kernels):
    rows = []
    for basis, described in BASES.items():
        for granularity, channels in (("layer", None), ("channel", CHANNELS)):
            activation = expansion(basis, described.default_degree, granularity, channels)
            told = [" ".join([str(small), *(f"({a}, {b})" for a, b in big)]) for small, big in kernels(activation)]
            rows.append(f"{basis} {granularity}: {' | '.join(told)}")
    return "\n".join(rows)


def test_kernels_on_a_cpu():
    assert_expected_inline(
        table(on_cpu),
        """\
hermite layer: 0 (1, 1) | 1 (2, 1)
hermite channel: 0 (1, 1) | 1 (2, 1)
fourier layer: 3 (1, 1) | 4 (2, 1)
fourier channel: 3 (1, 1) | 4 (2, 1)
tropical layer: 1 (1, 1) | 3 (2, 1)
tropical channel: 1 (1, 1) | 4 (2, 1)
tropical_rational layer: 1 (1, 1) | 4 (2, 1)
tropical_rational channel: 1 (1, 1) | 5 (2, 1)
chebyshev layer: 0 (1, 1) | 1 (2, 1)
chebyshev channel: 0 (1, 1) | 1 (2, 1)
safe_rational layer: 0 (1, 1) | 1 (2, 1)
safe_rational channel: 0 (1, 1) | 1 (2, 1)
piecewise_power layer: 0 (1, 1) | 1 (2, 1)
piecewise_power channel: 0 (1, 1) | 1 (2, 1)
gelu_series layer: 0 (1, 1) | 1 (2, 1)
gelu_series channel: 0 (1, 1) | 1 (2, 1)
silu_series layer: 0 (1, 1) | 1 (2, 1)
silu_series channel: 0 (1, 1) | 1 (2, 1)
relu_squared_series layer: 0 (1, 1) | 1 (2, 1)
relu_squared_series channel: 0 (1, 1) | 1 (2, 1)""",
    )


def test_kernels_on_a_gpu():
    assert_expected_inline(
        table(on_gpu),
        """\
hermite layer: 0 (1, 1) | 1 (2, 1)
hermite channel: 0 (1, 1) | 1 (2, 1)
fourier layer: 1 (1, 1) | 2 (2, 1)
fourier channel: 1 (1, 1) | 2 (2, 1)
tropical layer: 1 (1, 1) | 2 (2, 1)
tropical channel: 1 (1, 1) | 2 (2, 1)
tropical_rational layer: 1 (1, 1) | 2 (2, 1)
tropical_rational channel: 1 (1, 1) | 2 (2, 1)
chebyshev layer: 0 (1, 1) | 1 (2, 1)
chebyshev channel: 0 (1, 1) | 1 (2, 1)
safe_rational layer: 0 (1, 1) | 1 (2, 1)
safe_rational channel: 0 (1, 1) | 1 (2, 1)
piecewise_power layer: 0 (1, 1) | 1 (2, 1)
piecewise_power channel: 0 (1, 1) | 1 (2, 1)
gelu_series layer: 0 (1, 1) | 1 (2, 1)
gelu_series channel: 0 (1, 1) | 1 (2, 1)
silu_series layer: 0 (1, 1) | 1 (2, 1)
silu_series channel: 0 (1, 1) | 1 (2, 1)
relu_squared_series layer: 0 (1, 1) | 1 (2, 1)
relu_squared_series channel: 0 (1, 1) | 1 (2, 1)""",
    )
