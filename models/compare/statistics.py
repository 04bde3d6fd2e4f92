"""Paired differences over seeds, with confidence intervals of Student's t and of the bootstrap.

No library is needed: for a whole number of degrees of freedom, t has a distribution function in closed form.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
# Up to this many seeds, all resamples are counted instead of drawn: 6^6 of them.
_COUNTED, _DRAWN = 6, 100_000
Measured = Mapping[int, Mapping[str, float]]  # measures by seed
Interval = tuple[float, float]


@dataclass
class Difference:
    """A measure of one activation minus that of the reference, over the seeds that both finished.

    Args:
        mean: of the paired differences.
        better: number of seeds on which the activation is better than the reference.
        pairs: number of seeds.
        t: the 95 % interval of Student's t for the mean of the differences; None with a single seed.
        bootstrap: the 95 % percentile interval of the mean over resampled seeds; None with a single seed.
    """

    mean: float
    better: int
    pairs: int
    t: Interval | None
    bootstrap: Interval | None


def difference(values: Measured, reference: Measured, measure: str, larger_is_better: bool) -> Difference | None:
    """The difference of a measure from the reference's, paired by seed; None if no seed has it in both."""
    both = [seed for seed in sorted(values) if measure in values[seed] and measure in reference.get(seed, {})]
    found = [values[seed][measure] - reference[seed][measure] for seed in both]
    if not found:
        return None
    sign = 1 if larger_is_better else -1
    better = sum(sign * one > 0 for one in found)
    return Difference(statistics.fmean(found), better, len(found), t_interval(found), bootstrap_interval(found))


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; a single value has no deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def t_interval(values: Sequence[float]) -> Interval | None:
    """mean -+ t s / sqrt(n), the 95 % confidence interval of the mean of normal values; None for a single one."""
    if len(values) < 2:
        return None
    mean, std = statistics.fmean(values), statistics.stdev(values)
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * std / math.sqrt(len(values))
    return mean - half, mean + half


def bootstrap_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % percentile interval of the mean over resamples with replacement; None for a single value.

    Up to six values all resamples are counted; more are drawn 100,000 times, always the same ones. With few values the
    interval is too narrow: three equal signs already exclude 0.
    """
    count = len(values)
    if count < 2:
        return None
    if count <= _COUNTED:
        means = np.array(list(itertools.product(values, repeat=count))).mean(1)
    else:
        chosen = np.random.default_rng(0).integers(count, size=(_DRAWN, count))
        means = np.asarray(values)[chosen].mean(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def t_quantile(probability: float, freedom: int) -> float:
    """The number that Student's t with so many degrees of freedom stays below with this probability, above 1/2."""
    low, high = 0.0, 1.0
    while t_below(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_below(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_below(t: float, freedom: int) -> float:
    """P(T < t) for t >= 0, and a whole number of degrees of freedom from 1 up.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    # cos + 2/3 cos^3 + (2 4)/(3 5) cos^5 ... or 1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 ...
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + inside) / 2
