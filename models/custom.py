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
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.memory import available_memory, shown
from ortho_fx.models.data.batch import Batch
from ortho_fx.user_files import called, load_factory

# Modules with parameters that earlier calls of `model()` have returned.
_GIVEN: WeakSet[nn.Module] = WeakSet()
# A validation of more batches is taken for one that never ends.
_MOST_BATCHES = 10_000
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
            OrthoFxError: code that raises, a result that is no module, or one with modules of an earlier result.
        """
        model = called(f"the model of {self.name}", self.hooks.model)
        if not isinstance(model, nn.Module):
            raise OrthoFxError(f"model() of {self.name} must return a torch.nn.Module; got {type(model).__name__}")
        inside = {name: module for name, module in model.named_modules() if [*module.parameters(recurse=False)]}
        again = next((name for name, module in inside.items() if module in _GIVEN), None)
        if again is not None:
            raise OrthoFxError(
                f"model() of {self.name} must return a new model; {again or 'all of it'} is from an earlier call, and "
                "two runs would train the same weights"
            )
        _GIVEN.update(inside.values())
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
        OrthoFxError: batches of another form or size, no validation batch or ones that do not end, or batches that
            are others when they are asked for again.
    """

    kind: ClassVar[Literal["samples"]] = "samples"

    def __init__(self, custom: Custom, size: int) -> None:
        self.custom, self.name, self.size = custom, custom.name, size
        self._validation = self._held()
        self._place: tuple[int, int] | None = None
        self._batches: Iterator[Any] = iter(())
        first, self._place = self.batch(0, 0, size), None
        if not all(map(_equal, first, self.batch(0, 0, size))):
            raise OrthoFxError(
                f"batches(0, {size}) of {self.name} began with another batch at its second call: the same seed must "
                "give the same batches, or runs could not be compared"
            )
        # What `data_digest` reads: the batches that two runs must share.
        read = [*first, *itertools.chain.from_iterable(self._validation)]
        self.content = torch.cat([tensor.detach().reshape(-1).double() for tensor in read]).numpy()

    def _held(self) -> list[Batch]:
        """The validation batches, which are read once and kept."""
        what, read = f"batches(None, {self.size}) of {self.name}", f"the validation batches of {self.name}"
        held: list[Batch] = []
        room, taken, end = available_memory(), 0, object()
        batches = called(read, lambda: iter(self.custom.hooks.batches(None, self.size)))
        while (batch := called(read, lambda: next(batches, end))) is not end:
            held.append(self._checked(batch, None))
            taken += sum(tensor.nbytes for tensor in held[-1])
            if len(held) > _MOST_BATCHES or (room is not None and taken > room / 2):
                raise OrthoFxError(
                    f"{what} had not ended after {len(held):,} batches, {shown(taken)}: without a seed it has the "
                    "validation batches, which are kept in memory, and ends"
                )
        if not held:
            raise OrthoFxError(f"{what} must have a validation batch; it has none")
        return held

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


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _parts(batch: Any) -> list[Any]:
    return list(batch) if isinstance(batch, tuple | list) else [batch]


Loss = Callable[[nn.Module, Batch], Tensor]
