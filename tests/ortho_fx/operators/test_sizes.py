"""Compiled operators where sizes change or depend on data: their numbers, and how often they compile."""

import pytest
import torch

from ortho_fx import torch_private
from tests.ortho_fx.operators.expansions import (
    LAST,
    CountedInductor,
    assert_near,
    exact,
    expansion,
    noise,
    outcome,
    tensors,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]

_compiler = torch_private.load(torch_private.TESTS)


def shapes_of(batch, layout):
    return noise(batch, 24) if layout is None else noise(batch, 6, 5, 7).to(memory_format=layout)


@pytest.mark.parametrize(
    ("basis", "granularity", "channels", "layout", "dynamic", "compiles"),
    [
        ("hermite", "layer", None, None, None, 2),
        ("fourier", "layer", None, None, True, 1),
        ("tropical", "channel", 24, None, "mark", 1),
        ("tropical_rational", "channel", 6, LAST, "mark", 1),
        ("hermite", "group:3", 6, LAST, True, 2),
    ],
)
def test_batches_of_four_sizes_take_one_or_two_compiles(basis, granularity, channels, layout, dynamic, compiles):
    activation = expansion(basis, 3, granularity, channels)
    counter = CountedInductor()
    dims = None if dynamic == "mark" else dynamic
    compiled = torch.compile(activation, backend=counter, fullgraph=True, dynamic=dims)
    for batch in (4, 9, 33, 128):
        x = shapes_of(batch, layout)

        def call(x):
            if dynamic == "mark":
                _compiler.mark_dynamic(x, 0)
            return compiled(x)

        seed = noise(*x.shape, seed=1)
        assert_near(outcome(activation, call, x, seed), exact(activation, x, seed), 1e-5, batch)
    assert counter.graphs == compiles


def test_sizes_that_depend_on_data():
    layer, channel = expansion("hermite"), expansion("tropical", 3, "channel", 7)

    def rows(x):
        return x[:, 0] > 0

    def elements(x):
        return x > 0

    with _compiler.dynamo.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda x, z: (channel(x[rows(x)]), layer(z[elements(z)])), fullgraph=True)
        for batch in (5, 50):
            xs = [noise(batch, 7).requires_grad_() for _ in range(2)]
            ys = compiled(*xs)
            torch.autograd.backward([y.sum() for y in ys])
            for activation, pick, x, y in zip((channel, layer), (rows, elements), xs, ys, strict=True):
                picked = pick(x)
                value, grad_x, *rest = exact(activation, x[picked], torch.ones_like(y))
                gradients = [p.grad for p in tensors(activation, x)[1:] if p.requires_grad]
                assert_near([y, x.grad[picked], *gradients], [value, grad_x, *rest], 1e-5)
                activation.zero_grad()
