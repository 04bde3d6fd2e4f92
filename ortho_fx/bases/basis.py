"""What every basis provides: its parameters by name, its value, and its exact gradients.

The formulas are elementwise and written in + - *, the functions below, and the methods `relu`, `cos` and `sin`, with
the meaning that they have for tensors. What stands for a number may so be a tensor, whole or a block of one, or a value
in a kernel that is being generated: one formula serves them all. Parameters are indexed,
`coefficients[k]`, and have a length; whatever they hold broadcasts against the input, so the formula is the same for
one expansion a layer and one a channel. Arithmetic runs in one dtype, float32 or float64: whoever calls casts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
class Basis(ABC):
    """A family of functions y(x; parameters) of one real variable."""

    name: str
    title: str
    parameters: tuple[Parameter, ...]
    degrees: range
    default_degree: int

    @property
    def learnable(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters if parameter.learnable)

    def prepare(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        """What `evaluate` and `derivatives` take in the place of the parameters: what is computed once for all x.

        As many tensors as there are parameters, with as many numbers in all, computed in this dtype; the parameters
        themselves, unless a basis says otherwise. What follows them is for `collect` alone.
        """
        return parameters

    @abstractmethod
    def evaluate(self, x: Value, *parameters: Value) -> Value:
        """y(x)."""

    @abstractmethod
    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        """The vector-Jacobian product before it is summed up: the gradient of x, and the terms of `collect`.

        Each is computed when it is called for, and shares what it can with those called before.
        """

    @abstractmethod
    def collect(self, sums: Tensor, parameters: Sequence[Tensor], prepared: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradient of each learnable parameter, in order, from the terms summed over all that share an expansion.

        `sums` holds a term a row; its other dimensions are those of the parameters, which are in its dtype. `prepared`
        is what `prepare` has made of them.
        """
