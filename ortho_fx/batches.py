"""Batches that users pass: their forms, the call of a model with one, and the inputs in the items of a DataLoader.

A batch is a tensor, a tuple of positional arguments or a map of keyword arguments. The items of a DataLoader are what a
training loop takes apart: inputs with targets, or a dict of columns. `batches_of` takes the inputs out of them. It goes
by the signature of forward alone, and only for a DataLoader: a tuple in any other iterable is the model's arguments.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader

from ortho_fx.arguments import is_integer
from ortho_fx.errors import OrthoFxError

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]

# What a dict of columns may call its targets. A forward with **kwargs takes any key, and means none of these.
_TARGETS = frozenset({"label", "labels", "label_ids", "target", "targets"})
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ANY = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def call(model: nn.Module, batch: Batch) -> Any:
    """Calls the model with a tensor, a tuple of positional arguments or a map of keyword arguments.

    Raises:
        OrthoFxError: the model raised an error for anything but a tensor; the message says what it was called with.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        # To PyTorch a packed sequence is a tuple, to a model it is one input.
        if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
            return model(*batch)
        return model(batch)
    except (OrthoFxError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(batch, Tensor):
            raise
        raise OrthoFxError(
            f"{type(model).__name__} was called with {_described(batch)} and raised {type(error).__name__}: {error}. A "
            "tuple stands for positional arguments, and a dict for keyword arguments. Leave out what forward does not "
            "take: pass batch[0] of (inputs, targets), or let batches= be (batch[0] for batch in loader). If batches= "
            "is a DataLoader itself, ortho_fx takes the inputs that forward requires"
        ) from error


def batches_of(model: nn.Module, batches: Iterable[Any], limit: int | None = None) -> Iterator[Batch]:
    """The batches in the form that `call` takes; of a DataLoader's items, what forward takes, on the model's device.

    - A tuple or list gives its leading items, as many as forward has positional parameters without a default, and at
      least one.
    - A dict gives the keys that forward takes. A forward with `**kwargs` gets all keys except those of targets, such as
      "labels", that it does not name.
    - A dataclass gives the fields that forward takes.
    - A forward that takes none of the keys or fields, and has one parameter, gets the dict or dataclass whole.
    - Anything else is the only argument.

    Args:
        model: the model; the signature of a wrapped module counts, not that of its wrapper.
        batches: a DataLoader, of PyTorch or of a library that makes its own, or any other iterable of batches.
        limit: the most batches that are taken; all of them for None.

    Raises:
        OrthoFxError: `batches` cannot be iterated or is one batch, a limit below 1, or an item of a DataLoader without
            an input that forward requires.
    """
    if limit is not None and (not is_integer(limit) or limit < 1):
        raise OrthoFxError(f"limit must be an integer above zero, or None; got {limit!r}")
    if isinstance(batches, Mapping):
        raise OrthoFxError("batches must be an iterable of batches; got one batch, a dict: pass [batch]")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise OrthoFxError(f"batches must be a DataLoader or an iterable of batches; got {type(batches).__name__}")
    return _taken(model, batches, limit)


def _taken(model: nn.Module, batches: Iterable[Any], limit: int | None) -> Iterator[Batch]:
    """As `batches_of`. Workers of a DataLoader start with the first batch, so that their errors come from there."""
    if not _is_loader(batches):
        yield from itertools.islice(batches, limit)
        return
    takes, device = _parameters_of_forward(model), _device_of(model)
    for item in itertools.islice(batches, limit):
        yield _moved(_inputs_of(item, takes, type(model).__name__), device)


def why_empty(batches: Iterable[Any]) -> str:
    """The reason, in a clause, why no batch came from `batches`."""
    if isinstance(batches, DataLoader):
        size = operator.length_hint(batches.dataset, -1)
        samples = f": its dataset holds {size} samples" if size >= 0 else ""
        dropped = f", and drop_last leaves out a batch below {batches.batch_size}" if batches.drop_last else ""
        return f"the DataLoader gave no batch{samples}{dropped}"
    if isinstance(batches, Iterator):
        return "batches gave no batch: an iterator can be used once, so make it anew, or pass a list or a DataLoader"
    return "batches is empty"


def _is_loader(batches: Iterable[Any]) -> bool:
    """Whether this is a DataLoader, or a loader around one, such as a library's that copies batches ahead."""
    return isinstance(batches, DataLoader) or isinstance(getattr(batches, "loader", None), DataLoader)


def _parameters_of_forward(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of the model's forward, or of the module inside of its wrappers.

    A wrapper, such as those of DDP, FSDP and torch.compile, has forward(*inputs, **named) and holds one module.
    """
    while True:
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):  # a callable without a signature
            return []
        inner = list(model.children())
        if {parameter.kind for parameter in parameters} != _ANY or len(inner) != 1:
            return parameters
        (model,) = inner


def _inputs_of(item: Any, takes: list[inspect.Parameter], name: str) -> Batch:
    """The inputs in an item of a DataLoader."""
    if isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
        return _named(item, item, takes, name)
    if dataclasses.is_dataclass(item):
        fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        return _named(item, fields, takes, name)
    if not isinstance(item, tuple | list) or isinstance(item, PackedSequence):
        return (item,)
    required = [one.name for one in takes if one.kind in _BY_POSITION and one.default is one.empty]
    count = max(len(required), 1)
    if len(item) < count:
        raise OrthoFxError(
            f"forward of {name} requires {', '.join(required) or 'an input'}, and an item of the DataLoader holds "
            f"{len(item)}: {_described(item)}"
        )
    if count == 1 and isinstance(item[0], Mapping):  # (inputs by name, targets)
        return _inputs_of(item[0], takes, name)
    return tuple(item[:count])


def _named(item: Any, values: Mapping[str, Any], takes: list[inspect.Parameter], name: str) -> Batch:
    """The values that forward takes by name; the item whole for a forward of one argument that takes none of them."""
    names = {one.name for one in takes if one.kind in _BY_NAME}
    anything = not takes or any(one.kind == inspect.Parameter.VAR_KEYWORD for one in takes)
    required = [one.name for one in takes if one.kind not in _ANY and one.default is one.empty]
    if len(required) == 1 and not names & values.keys():
        return (item,)
    found = {key: value for key, value in values.items() if key in names or (anything and key not in _TARGETS)}
    missing = [key for key in required if key not in found]
    if missing or not found:
        raise OrthoFxError(
            f"forward of {name} takes {', '.join(sorted(names)) or 'no names'}, and an item of the DataLoader holds "
            f"{', '.join(values) or 'nothing'}: {', '.join(missing) or 'an input'} is missing. Give the columns these "
            "names, or let batches= be a generator of what forward takes"
        )
    return found


def _device_of(model: nn.Module) -> torch.device | None:
    """The device of the first parameter or buffer; None if the model has neither, or keeps them elsewhere meanwhile."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if first is None or first.is_meta else first.device


def _moved(value: Any, device: torch.device | None) -> Any:
    """The same value with its tensors on a device."""
    if device is None:
        return value
    if callable(getattr(value, "to", None)):  # a tensor, a packed sequence, or a library's batch
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(one, device) for key, one in value.items()}
    if isinstance(value, tuple | list):
        values = [_moved(one, device) for one in value]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(moved, field.name, _moved(getattr(value, field.name), device))
        return moved
    return value


def _described(batch: Any) -> str:
    """The kinds and shapes in a batch: "(float32 (8, 3), int64 (8,))"."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {_described(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        shown = ", ".join(_described(value) for value in batch[:4]) + (", ..." if len(batch) > 4 else "")
        return f"[{shown}]" if isinstance(batch, list) else f"({shown})"
    return type(batch).__name__
