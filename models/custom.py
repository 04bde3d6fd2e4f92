"""A model and its data from a user's file, FILE.py:FACTORY, for a comparison.

The factory is called without arguments and returns an object with three methods:

    model()               a new torch.nn.Module; PyTorch's generator is seeded before the call
    batches(seed, size)   an iterable of (inputs, targets), two tensors with `size` rows; the same for the same seed. It
                          must not end while a run trains. With the seed None it has the validation batches, and ends.
    loss(model, batch)    the mean loss of a batch, a tensor of one number

The inputs are what the model is called with. Expansions are calibrated on them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.data.batch import Batch
from ortho_fx.user_files import called, load_factory

HOOKS = ("model", "batches", "loss")
_NAME = re.compile(r"(?P<file>.+\.py):(?P<factory>[^:]+)", re.DOTALL)


def is_custom(text: str) -> bool:
    """Whether a text has the form FILE.py:FACTORY."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class Custom:
    """What a user's factory returned, under the name by which it was called."""

    name: str
    hooks: Any

    @classmethod
    def load(cls, text: str) -> Custom:
        """Runs the file and calls the factory that "FILE.py:FACTORY" names.

        Raises:
            OrthoFxError: no such file or factory, code that raises, or a result that lacks one of the three methods.
        """
        match = _NAME.fullmatch(text)
        assert match is not None
        factory = load_factory(Path(match["file"]), match["factory"])
        hooks = called(text, factory)
        missing = [name for name in HOOKS if not callable(getattr(hooks, name, None))]
        if missing:
            raise OrthoFxError(
                f"{text} must return an object with the methods {', '.join(HOOKS)}; got a {type(hooks).__name__} "
                f"without {', '.join(missing)}"
            )
        return cls(text, hooks)

    def model(self) -> nn.Module:
        """A new model.

        Raises:
            OrthoFxError: code that raises, or a result that is no module.
        """
        model = called(f"the model of {self.name}", self.hooks.model)
        if not isinstance(model, nn.Module):
            raise OrthoFxError(f"model() of {self.name} must return a torch.nn.Module; got {type(model).__name__}")
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch.

        Raises:
            OrthoFxError: a result that is no tensor of one number.
        """
        loss = self.hooks.loss(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise OrthoFxError(f"loss(model, batch) of {self.name} must return a tensor of one number; got {got}")
        return loss.reshape(())


class CustomBatches:
    """The batches of a user's file as `Data`.

    Args:
        custom: what the file defines.
        size: rows of a batch.

    Raises:
        OrthoFxError: batches of another form or size, or no validation batch.
    """

    kind: ClassVar[Literal["samples"]] = "samples"

    def __init__(self, custom: Custom, size: int) -> None:
        self.custom, self.name, self.size = custom, custom.name, size
        held = called(f"the validation batches of {self.name}", lambda: list(custom.hooks.batches(None, size)))
        if not held:
            raise OrthoFxError(f"batches(None, {size}) of {self.name} must have a validation batch; it has none")
        self._validation = [self._checked(batch, None) for batch in held]
        self._place: tuple[int, int] | None = None
        self._batches: Iterator[Any] = iter(())
        # What `data_digest` reads: the batches that two runs must share.
        shown = [*self.batch(0, 0, size), *itertools.chain.from_iterable(self._validation)]
        self.content = torch.cat([tensor.detach().reshape(-1).double() for tensor in shown]).numpy()

    def batch(self, seed: int, step: int, size: int, rows: slice = slice(None)) -> Batch:
        """Rows of a step's batch. Steps in order are cheap; another step has the batches before it made again."""
        if self._place is None or self._place[0] != seed or step < self._place[1]:
            self._batches = iter(called(f"the batches of {self.name}", lambda: self.custom.hooks.batches(seed, size)))
            self._place = (seed, 0)
        skipped = step - self._place[1]
        found = next(itertools.islice(self._batches, skipped, None), None)
        if found is None:
            raise OrthoFxError(f"batches({seed}, {size}) of {self.name} ended before step {step + 1}: it must not end")
        self._place = (seed, step + 1)
        inputs, targets = self._checked(found, size)
        return inputs[rows], targets[rows]

    def validation_batches(self, size: int) -> int:
        return len(self._validation)

    def validation_batch(self, number: int, size: int, rows: slice = slice(None)) -> Batch:
        inputs, targets = self._validation[number]
        return inputs[rows], targets[rows]

    def _checked(self, batch: Any, size: int | None) -> Batch:
        pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(one, Tensor) for one in batch)
        if not pair or any(one.dim() == 0 for one in batch) or len(batch[0]) != len(batch[1]):
            got = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in _parts(batch)]
            raise OrthoFxError(
                f"batches of {self.name} must be pairs of tensors, inputs and targets, with as many rows; got {got}"
            )
        if size is not None and len(batch[0]) != size:
            raise OrthoFxError(f"batches(seed, {size}) of {self.name} must have {size} rows; got {len(batch[0])}")
        return batch[0], batch[1]


def _parts(batch: Any) -> list[Any]:
    return list(batch) if isinstance(batch, tuple | list) else [batch]


Loss = Callable[[nn.Module, Batch], Tensor]
