"""What formulas of bases are written in: their parameters, and the operations that need a function.

The formulas are elementwise and written in + - *, the functions below, and the methods `relu`, `cos` and `sin`, with
the meaning that they have for tensors. An operand may be a tensor, a block of one, or a value of a kernel that is being
generated: one formula serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Value = Any
Term = Callable[[], Value]


def after(x: Value, place: Value) -> Value:
    """A mask of where x > place."""
    # A mask of numbers: tensor operations are several times slower with one of truth values.
    return (x - place).sign().relu() if isinstance(x, Tensor) else x > place


def masked(mask: Value, value: Value) -> Value:
    """`value` where the mask holds, 0 elsewhere."""
    return mask * value if isinstance(mask, Tensor) else mask.where(value, 0.0)


def multiply_add(factor: Value, other: Value, summand: Value) -> Value:
    """factor * other + summand, in one operation where there is one."""
    if isinstance(summand, Tensor) and isinstance(other, Tensor):
        return torch.addcmul(summand, factor, other)
    return factor * other + summand


@dataclass(frozen=True)
class Parameter:
    """One parameter of a basis: `size(degree)` numbers, in a tensor of that length.

    Parameters of one number have the shape (1,), not (): FSDP2 cannot shard a tensor without a dimension. Those that
    can be tied are one number where an expansion asks for it, of which the formulas take multiples.
    """

    name: str
    learnable: bool = True
    offset: int = 0
    scalar: bool = False
    tieable: bool = False

    def size(self, degree: int, tied: bool = False) -> int:
        return 1 if self.scalar or (tied and self.tieable) else degree + self.offset


@dataclass(frozen=True)
class TorchorthoState:
    """What a class of torchortho 0.1 saves: how it is told from others, and what it is in the parameters of a basis.

    Attributes:
        title: the class.
        key: a key that no other class has.
        parameters: converts a state; its second argument says whether the expansion ties its frequencies.
        read: the keys that are read or constant. Those under `act_init` are the parameters of the function that a
            fit started from.
    """

    title: str
    key: str
    parameters: Callable[[Mapping[str, Tensor], bool], dict[str, Tensor]]
    read: frozenset[str]


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a state by our names, for those of its own names that it has."""
    return {ours: state[theirs] for theirs, ours in names.items() if theirs in state}
