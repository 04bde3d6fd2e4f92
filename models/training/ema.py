"""A moving average of a model's weights, which is often a better model than the last step's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """average <- d average + (1 - d) weights after each step, with d = min(decay, (1 + step) / (10 + step)).

    The rising d keeps the random start out of the average of a short run. Averages have the weights' shapes, dtypes
    and, for sharded parameters, shards.

    Args:
        model: the model whose parameters are averaged, expansions included.
        decay: from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after step number `step`; the first step is 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        lerp = get_ema_multi_avg_fn(decay)
        lerp(list(self.averages.values()), list(self.parameters.values()), None)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages as its weights in the block."""
        weights = [parameter.detach().clone() for parameter in self.parameters.values()]
        self._put(list(self.averages.values()))
        try:
            yield
        finally:
            self._put(weights)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters.values(), values, strict=True):
            parameter.copy_(value)
