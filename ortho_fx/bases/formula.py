"""The language of formulas: the parameters of a basis, and the operations that need a function.

Formulas are elementwise. They use + - * /, the functions below, and the methods `relu`, `cos`, `sin`, `exp`, `erf` and
`sigmoid` with their meaning for tensors. An operand may be a tensor, a block of one, or a value of a kernel that is
being generated: one formula serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Value = Any
Term = Callable[[], Value]
# The turns of one radian.
TURNS = 0.5 / math.pi


class Together(NamedTuple):
    """A formula in which one tensor holds all terms: each part is a function that computes it.

    Attributes:
        value: y(x).
        slope: y'(x).
        terms: what `Basis.derivatives` gives for a gradient of 1, along a first dimension.
    """

    value: Callable[[], Tensor]
    slope: Callable[[], Tensor]
    terms: Callable[[], Tensor]


def after(x: Value, place: Value) -> Value:
    """A mask: 1 where x > place, 0 elsewhere."""
    # A mask of numbers, because a boolean mask takes several times as long in tensor operations, and twice as long in
    # a kernel for a CPU.
    return (x - place).sign().relu() if isinstance(x, Tensor) else (x > place).as_number()


def masked(mask: Value, value: Value) -> Value:
    """`value` where the mask holds, 0 elsewhere; NaN if the value is not finite and the mask does not hold."""
    return mask * value


def multiply_add(factor: Value, other: Value, summand: Value) -> Value:
    """factor * other + summand, as one operation if possible."""
    if isinstance(summand, Tensor) and isinstance(other, Tensor):
        return torch.addcmul(summand, factor, other)
    if hasattr(other, "multiply_add"):
        return other.multiply_add(factor, summand)
    return factor * other + summand


def counts_turns(x: Value) -> bool:
    """Whether angles of waves are wanted in turns, and not in radians: see `Basis.prepare_for_kernels`."""
    return getattr(x, "counts_turns", False)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a basis: `size(degree)` numbers, in a tensor of that length.

    A parameter of one number has the shape (1,), not (): FSDP2 cannot shard a tensor without dimensions. A tieable
    parameter is one number in a tied expansion, and formulas use its multiples. A halved parameter has
    `degree // 2 + offset` numbers.
    """

    name: str
    learnable: bool = True
    offset: int = 0
    scalar: bool = False
    tieable: bool = False
    halved: bool = False

    def size(self, degree: int, tied: bool = False) -> int:
        if self.scalar or (tied and self.tieable):
            return 1
        return (degree // 2 if self.halved else degree) + self.offset


@dataclass(frozen=True)
class TorchorthoState:
    """The saved state of a torchortho 0.1 class: how to identify it, and how to convert it to a basis' parameters.

    Attributes:
        title: the name of the class.
        key: a key that no other class has.
        parameters: converts a state; its second argument says whether the expansion ties its frequencies.
        read: the keys that are read or constant. Keys under `act_init` are parameters of the function from which a fit
            started.
    """

    title: str
    key: str
    parameters: Callable[[Mapping[str, Tensor], bool], dict[str, Tensor]]
    read: frozenset[str]


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a state under our names; names that the state lacks are left out."""
    return {ours: state[theirs] for theirs, ours in names.items() if theirs in state}
