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


def test_merged_parts_are_as_one():
    numbers = torch.randn(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chunks = numbers[:1000], 100 * numbers[1000:2000] + 7, numbers[2000:] - 1e-3, numbers[:0]
    whole, parts = Histogram(), [Histogram() for _ in chunks]
    for chunk, part in zip(chunks, parts, strict=True):
        whole.add(chunk)
        part.add(chunk)
    merged = Histogram.merged(parts)
    assert merged.samples == merged.counts.sum() == 3000
    np.testing.assert_allclose([merged.mean, merged.std], [whole.mean, whole.std], rtol=1e-12)
    joined = torch.cat(chunks)
    # Every number within a bin of where it is: the counts below any point are those below it, but for its neighbours.
    for point in np.linspace(*merged.interval, 50):
        width = merged.edges[1] - merged.edges[0]
        below = merged.counts[merged.edges[1:] <= point].sum()
        assert (joined < point - 2 * width).sum() <= below <= (joined < point + 2 * width).sum()

    # Equal grids are added up exactly, and one part that has seen all is all.
    twice = Histogram.merged([whole, whole])
    assert np.array_equal(twice.counts, 2 * whole.counts)
    assert (twice.mean, twice.std, twice.interval) == (whole.mean, whole.std, whole.interval)
    alone = Histogram.merged([Histogram(), whole])
    assert (alone.mean, alone.std) == (whole.mean, whole.std)
    assert Histogram.merged([Histogram(), Histogram()]).samples == 0
    infinite = Histogram()
    infinite.add(torch.tensor([torch.inf, 1.0]))
    assert not Histogram.merged([whole, infinite]).finite
