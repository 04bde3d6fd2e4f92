"""What the trainer asks of data."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

Batch = tuple[Tensor, Tensor]
Kind = Literal["tokens", "images"]


class Data(Protocol):
    """Training batches by step, and the same validation batches at every call; pairs of inputs and targets.

    `name` tells data apart that differ, wherever it is: a run resumes only on the data that it began with.
    """

    name: str

    @property
    def kind(self) -> Kind: ...

    def batch(self, seed: int, step: int, size: int, rows: slice = ...) -> Batch:
        """Rows of the global batch of `size` of a step: each a function of (seed, step, row) alone."""
        ...

    def validation_batches(self, size: int) -> int:
        """How many batches of `size` the validation has."""
        ...

    def validation_batch(self, number: int, size: int, rows: slice = ...) -> Batch:
        """Rows of one of them; all are of one shape, the last filled up, with the target -100 for the filler."""
        ...
