"""What every basis provides: its parameters by name, its value, and its exact gradients.

`evaluate` and `gradients` are written in differentiable tensor operations and take tensors of one dtype (float32 or
float64; whoever calls them casts). `gradients` puts the input's gradient first, because Inductor's CPU backend fuses a
pointwise result into the reductions behind it only in this order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """One parameter of a basis: `size(degree)` numbers in a tensor of one dimension.

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
    def gradients(self, grad: Tensor, x: Tensor, *parameters: Tensor) -> Sequence[Tensor]:
        """The vector-Jacobian product: the gradient of `x`, then one of each learnable parameter, in order."""
