"""`Histogram`: the distribution of numbers that arrive in chunks, in one pass and constant memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ortho_fx.numerics.moments import Array
from ortho_fx.ragged import numbers
from ortho_fx.sharded import whole

_BINS = 2048


class Histogram:
    """The exact mean and standard deviation (of the population), and the counts of equal bins with a growing range.

    The moments of chunks are merged in float64 (Chan, Golub and LeVeque, 1979). The first chunk sets the range of the
    bins. For a number outside, neighbouring bins are joined, which doubles the range, until the number is inside.
    """

    def __init__(self) -> None:
        self.samples, self.mean, self._squares = 0, 0.0, 0.0
        self._low, self._width = 0.0, 0.0
        self.counts: Array = np.zeros(_BINS)

    def add(self, chunk: Tensor) -> None:
        """Adds the numbers of a tensor; a tensor on the meta device has none."""
        chunk = whole(numbers(chunk))
        if chunk.numel() == 0 or chunk.is_meta:
            return
        # MPS has no float64, so it reduces in float32. Chunks are still merged in float64 on the host.
        dtype = torch.float32 if chunk.device.type == "mps" else torch.float64
        values = chunk.to(dtype)
        variance, mean = torch.var_mean(values, correction=0)
        self._merge_moments(values.numel(), mean.item(), variance.item() * values.numel())
        if math.isfinite(self._squares):
            self._count(values)

    @classmethod
    def merged(cls, parts: Sequence[Histogram]) -> Histogram:
        """One of all their numbers: mean and deviation exact, bins as wide as the widest, or wider to hold all.

        The numbers of a narrower bin are counted where its centre lies. The order decides the rounding alone.
        """
        filled = [part for part in parts if part.samples]
        if len(filled) == 1:
            return filled[0]
        merged = cls()
        for part in filled:
            merged._merge_moments(part.samples, part.mean, part._squares)
        grids = {(part._low, part._width) for part in filled}
        if len(grids) == 1 and merged.finite:
            ((merged._low, merged._width),) = grids
            merged.counts = np.sum([part.counts for part in filled], axis=0)
        elif filled and merged.finite:
            low, high = (bound(part.interval[end] for part in filled) for end, bound in enumerate((min, max)))
            width = max(max(part._width for part in filled), 2.0 ** math.ceil(math.log2((high - low) / (_BINS - 1))))
            merged._low, merged._width = width * math.floor(low / width), width
            for part in filled:
                held = np.flatnonzero(part.counts)
                centres = part._low + part._width * (held + 0.5)
                np.add.at(merged.counts, ((centres - merged._low) / width).astype(np.int64), part.counts[held])
        return merged

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / self.samples) if self.samples else math.nan

    @property
    def finite(self) -> bool:
        return math.isfinite(self._squares)

    @property
    def constant(self) -> bool:
        """Whether all numbers are equal, within the precision of float64."""
        return self.std <= 1e-12 * max(abs(self.mean), 1e-30)

    @property
    def edges(self) -> Array:
        """The edges of the bins: one more than `counts` has numbers."""
        return self._low + self._width * np.arange(len(self.counts) + 1, dtype=np.float64)

    @property
    def interval(self) -> tuple[float, float]:
        """The interval from the start of the first filled bin to the end of the last."""
        filled = np.flatnonzero(self.counts)
        edges = self.edges
        return float(edges[filled[0]]), float(edges[filled[-1] + 1])

    def _merge_moments(self, count: int, mean: float, squares: float) -> None:
        delta, total = mean - self.mean, self.samples + count
        self._squares += squares + delta**2 * self.samples * count / total
        self.mean += delta * count / total
        self.samples = total

    def _count(self, values: Tensor) -> None:
        low, high = (bound.item() for bound in torch.aminmax(values))
        if not self._width:
            # The width of a bin is a power of two, so that joined bins have exact edges.
            span = max(high - low, abs(low) * 1e-6, 1e-30)
            self._width = 2.0 ** math.ceil(math.log2(1.5 * span / _BINS))
            self._low = self._width * math.floor((low - span / 4) / self._width)
        while low < self._low or high >= self._low + self._width * _BINS:
            self._double(downwards=low < self._low)
        places = ((values - self._low) / self._width).long().clamp(0, _BINS - 1)
        self.counts += torch.bincount(places, minlength=_BINS).cpu().numpy()

    def _double(self, *, downwards: bool) -> None:
        joined = self.counts.reshape(-1, 2).sum(1)
        nothing = np.zeros(_BINS - len(joined))
        if downwards:
            self._low -= self._width * _BINS
            self.counts = np.concatenate([nothing, joined])
        else:
            self.counts = np.concatenate([joined, nothing])
        self._width *= 2
