"""A problem for `ortho-fx compare`: a GPT-2 of 0.13 million parameters, on the text that GPT-2 small learns from.

    ortho-fx compare benchmarks/narrow_gpt2.py:NarrowGPT2 --steps 6000 --batch-size 8 --lr 0.004 --weight-decay 0.1 \\
        --activations gelu fourier:5 --out runs/narrow

It is small enough to try many settings over thousands of steps: it sees 47 bytes for each parameter in 6,000 of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx.models.data.text import StandardLibrary
from ortho_fx.models.gpt2 import GPT2, GPT2Config

CONFIG = GPT2Config(vocabulary=256, context=128, layers=4, heads=4, width=48)


class NarrowGPT2:
    """The model, its windows of bytes and its loss, in nats for each byte."""

    def __init__(self) -> None:
        self.text = StandardLibrary(CONFIG.context)

    def model(self) -> nn.Module:
        return GPT2(CONFIG)

    def batches(self, seed: int | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random windows of the training text; those of the validation text without a seed."""
        if seed is None:
            batches = range(self.text.validation_batches(size))
            yield from (self.text.validation_batch(number, size) for number in batches)
        else:
            yield from (self.text.batch(seed, step, size) for step in count())

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)
