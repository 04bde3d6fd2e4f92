"""What every basis provides: its parameters by name, its value, and its exact gradients.

`evaluate` and `gradients` are written in differentiable tensor operations and take tensors of one dtype (float32 or
float64; whoever calls them casts). The first dimension of a parameter counts its numbers; the others, if any,
broadcast against the input, so one formula serves one expansion a layer and one a channel. `gradients` puts the
input's gradient first, because Inductor's CPU backend fuses a pointwise result into the reductions behind it only in
this order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a basis: `size(degree)` numbers, in a tensor of that length.

    Parameters of one number have the shape (1,), not (): FSDP2 cannot shard a tensor without a dimension.
    """

    name: str
    learnable: bool = True
    offset: int = 0
    scalar: bool = False

    def size(self, degree: int) -> int:
        return 1 if self.scalar else degree + self.offset


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

    @abstractmethod
    def evaluate(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """y(x), elementwise: the shape of `x`."""

    @abstractmethod
    def gradients(self, grad: Tensor, x: Tensor, reduce: Reduce, *parameters: Tensor) -> Sequence[Tensor]:
        """The vector-Jacobian product: the gradient of `x`, then one of each learnable parameter, in order.

        `reduce` sums a tensor of the shape of `x` over all that share one expansion.
        """
