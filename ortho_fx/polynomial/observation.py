"""What the expansions of a model get on given batches: ranges, mean, deviation and number of calls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ortho_fx.batches import Batch, batches_of, call, why_empty
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.watch import watching


class Inputs:
    """The inputs of one activation; `calls` is the largest number of calls in one batch."""

    def __init__(self) -> None:
        self.histogram, self.low, self.high = Histogram(), math.inf, -math.inf
        self.calls, self.batch, self._calls = 0, -1, 0

    def add(self, x: Tensor, batch: int) -> None:
        self._calls = self._calls + 1 if batch == self.batch else 1
        self.batch, self.calls = batch, max(self.calls, self._calls)
        self.histogram.add(x)
        if x.numel():
            low, high = (bound.item() for bound in torch.aminmax(x.detach()))
            # With the arguments in this order, min and max keep a NaN.
            self.low, self.high = min(low, self.low), max(high, self.high)


@dataclass(frozen=True)
class Observation:
    """The inputs of the expansions in the order of their first calls, and the size of the model's output.

    `largest_output` is the largest absolute value of the outputs; None if one of them is not a tensor of real numbers.
    """

    inputs: dict[str, Inputs]
    largest_output: float | None


def observe(
    model: nn.Module, expansions: Mapping[str, nn.Module], batches: Iterable[Batch], limit: int | None
) -> Observation:
    """Runs the model on the batches, without gradients.

    Raises:
        OrthoFxError: no batch, one that the model cannot be called with, or inputs that are not finite.
    """
    seen: dict[str, Inputs] = {}
    batch = -1
    largest: float | None = 0.0

    def see(name: str, x: Tensor, _: Tensor) -> None:
        seen.setdefault(name, Inputs()).add(x, batch)

    with torch.no_grad(), watching(expansions, see):
        for batch, values in enumerate(batches_of(model, batches, limit)):  # noqa: B007 `see` reads it
            output = call(model, values)
            if largest is None or not isinstance(output, Tensor) or not output.is_floating_point():
                largest = None
            elif output.numel():
                size = output.abs().max().item()
                largest = max(largest, math.inf if math.isnan(size) else size)
    if not seen:
        why = why_empty(batches) if batch < 0 else "the model calls none of them"
        raise OrthoFxError(f"no batch reached an expansion: {why}")
    for name, inputs in seen.items():
        if not inputs.histogram.finite:
            raise OrthoFxError(f"the inputs of {name} are not finite")
    return Observation(seen, largest)
