"""Statistics of comparisons, against published and exact numbers."""

import itertools
import math
import statistics

import pytest

from ortho_fx.models.compare.statistics import bootstrap_interval, difference, spread, t_below, t_interval, t_quantile


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_of_t_are_those_of_the_tables(freedom, published):
    assert t_quantile(0.975, freedom) == pytest.approx(published, abs=5e-4)


def test_t_is_the_integral_of_its_density():
    for freedom in (1, 2, 3, 4, 7, 8):
        constant = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        width = 1e-4
        places = (width * (n + 0.5) for n in range(15_000))
        area = width * sum(constant * (1 + t * t / freedom) ** (-(freedom + 1) / 2) for t in places)
        assert t_below(1.5, freedom) == pytest.approx(0.5 + area, abs=1e-8)


def test_the_interval_of_t_of_known_numbers():
    # Student's example of 1908: the additional hours of sleep of ten patients, 0.70 to 2.46.
    hours = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    low, high = t_interval(hours)
    assert (round(low, 2), round(high, 2)) == (0.70, 2.46)
    assert t_interval([1.0]) is None


def test_the_bootstrap_counts_all_resamples_of_few_values():
    values = [1.0, 2.0, 4.0]
    means = sorted(statistics.fmean(one) for one in itertools.product(values, repeat=3))
    low, high = bootstrap_interval(values)
    assert means[0] <= low <= means[1]
    assert means[-2] <= high <= means[-1]
    assert bootstrap_interval([3.0]) is None
    assert bootstrap_interval([2.0] * 3) == (2.0, 2.0)


def test_the_bootstrap_of_many_values_is_always_the_same_and_close_to_the_normal_one():
    values = [float((7 * n) % 50) for n in range(50)]
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    error = statistics.pstdev(values) / math.sqrt(50)
    assert low == pytest.approx(24.5 - 1.96 * error, abs=0.1)
    assert high == pytest.approx(24.5 + 1.96 * error, abs=0.1)


def losses(*values):
    return {seed: {"loss": value} for seed, value in values}


def test_differences_are_paired_by_seed():
    found = difference(losses((0, 1.0), (1, 2.0), (2, 9.0)), losses((1, 2.5), (0, 1.1)), "loss", False)
    assert found.mean == pytest.approx((-0.1 - 0.5) / 2)
    assert (found.better, found.pairs) == (2, 2)
    half = t_quantile(0.975, 1) * statistics.stdev([-0.1, -0.5]) / math.sqrt(2)
    assert found.t == pytest.approx((-0.3 - half, -0.3 + half))
    # Of the four resamples, a quarter has each end; quantiles lie between them.
    assert found.bootstrap == pytest.approx((-0.485, -0.115))
    alone = difference(losses((0, 1.0)), losses((0, 2.0)), "loss", True)
    assert (alone.t, alone.bootstrap, alone.better) == (None, None, 0)
    assert difference(losses((0, 1.0)), losses((1, 2.0)), "loss", False) is None


def test_spread_of_one_value_has_no_deviation():
    assert spread([2.0]) == (2.0, None)
    assert spread([1.0, 3.0]) == (2.0, math.sqrt(2))
