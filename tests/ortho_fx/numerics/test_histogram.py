import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ortho_fx.numerics.histogram import Histogram


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scales=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5),
    shift=st.floats(-1e3, 1e3),
)
def test_every_number_is_in_its_bin_however_the_range_grew(seed, scales, shift):
    generator = torch.Generator().manual_seed(seed)
    chunks = [shift + scale * torch.randn(500, generator=generator, dtype=torch.float64) for scale in scales]
    histogram = Histogram()
    for chunk in chunks:
        histogram.add(chunk)
    every = torch.cat(chunks).numpy()
    assert histogram.samples == len(every)
    assert histogram.mean == pytest.approx(every.mean(), rel=1e-9, abs=1e-9)
    assert histogram.std == pytest.approx(every.std(), rel=1e-9)
    counts, _ = np.histogram(every, histogram.edges)
    np.testing.assert_array_equal(histogram.counts, counts)
    low, high = histogram.interval
    assert low <= every.min()
    assert high >= every.max()


def test_bins_are_fine_beside_the_spread():
    histogram = Histogram()
    for _ in range(10):
        histogram.add(torch.randn(100_000))
    low, high = histogram.interval
    assert (high - low) / np.count_nonzero(histogram.counts) < 0.03 * histogram.std


def test_constants_and_what_is_not_finite_are_known():
    constant, infinite = Histogram(), Histogram()
    constant.add(torch.full((100,), 3.0))
    infinite.add(torch.tensor([1.0, math.inf]))
    assert (constant.constant, constant.finite) == (True, True)
    assert not infinite.finite
    empty = Histogram()
    empty.add(torch.empty(0))
    assert empty.samples == 0
