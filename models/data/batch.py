"""The interface between data and the trainer."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

Batch = tuple[Tensor, Tensor]
Kind = Literal["tokens", "images", "samples"]


class Data(Protocol):
    """Training batches by step, and a fixed list of validation batches. A batch is a pair of inputs and targets.

    `name` identifies the data by its content, not by its path: a run resumes only on the data that it began with.
    """

    name: str

    @property
    def kind(self) -> Kind: ...

    def batch(self, seed: int, step: int, size: int, rows: slice = ...) -> Batch:
        """Rows of a step's global batch of `size`; each row is a function of (seed, step, row) alone."""
        ...

    def validation_batches(self, size: int) -> int:
        """Number of validation batches of `size`."""
        ...

    def validation_batch(self, number: int, size: int, rows: slice = ...) -> Batch:
        """Rows of one validation batch. All have the same shape; rows that fill up the last have the target -100."""
        ...
