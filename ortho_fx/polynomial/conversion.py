"""`to_polynomial`: writes a small network of affine maps and Hermite activations as one polynomial.

A Hermite expansion of degree n, applied to a polynomial of degree d, is a polynomial of degree n d. Affine maps keep
the degree, and products add degrees. So the whole network is one polynomial of its inputs, with
C(inputs + degree, degree) terms. Its coefficients are computed exactly, in float64; nothing is sampled or fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import fx, nn

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.arguments import is_integer
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.moments import Array
from ortho_fx.polynomial.graph import NotPolynomial, described, run_node, trace
from ortho_fx.polynomial.monomials import Dense, Integers, Monomials, ranks, tail_sums

_MOST_COEFFICIENTS = 2_000_000
# The largest number of monomial values that are computed at once in an evaluation: 32 MiB.
_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class Polynomial:
    """Polynomials y_j(x) = sum_t coefficients[t, j] prod_i x_i^exponents[t, i] of several inputs, one for each output.

    Attributes:
        exponents: (terms, inputs), int64; sorted by degree, and then with higher powers of the first inputs first.
        coefficients: (terms, outputs), float64.
    """

    exponents: Integers
    coefficients: Array

    @property
    def inputs(self) -> int:
        return self.exponents.shape[1]

    @property
    def outputs(self) -> int:
        return self.coefficients.shape[1]

    @property
    def terms(self) -> int:
        """The number of monomials with a nonzero coefficient in at least one output."""
        return int(self.coefficients.any(axis=1).sum())

    @property
    def degree(self) -> int:
        """The highest total degree of such a monomial; 0 for constants."""
        used = self.coefficients.any(axis=1)
        return int(self.exponents[used].sum(axis=1).max(initial=0))

    def __call__(self, x: ArrayLike) -> Array:
        """The values (..., outputs) at inputs (..., inputs), in float64.

        Powers are computed as products. The rounding error is about 1e-16 sqrt(terms) times the sum of the absolute
        values of the terms. Far outside of the range on which a network was trained, large terms cancel.

        Raises:
            OrthoFxError: the last dimension is not the number of inputs.
        """
        points = np.asarray(x, dtype=np.float64)
        if points.ndim == 0 or points.shape[-1] != self.inputs:
            raise OrthoFxError(f"the polynomial takes arrays of shape (..., {self.inputs}); got {points.shape}")
        rows = points.reshape(-1, self.inputs)
        values = np.empty((len(rows), self.outputs))
        highest = int(self.exponents.max(initial=0))
        size = max(1, _CHUNK // max(1, len(self.exponents)))
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            powers = np.ones((self.inputs, highest + 1, len(chunk)))
            for k in range(1, highest + 1):
                powers[:, k] = powers[:, k - 1] * chunk.T
            monomials = np.ones((len(self.exponents), len(chunk)))
            for column, power in zip(self.exponents.T, powers, strict=True):
                held = np.flatnonzero(column)
                monomials[held] *= power[column[held]]
            values[start : start + size] = monomials.T @ self.coefficients
        return values.reshape(*points.shape[:-1], self.outputs)

    def __add__(self, other: Polynomial) -> Polynomial:
        """The sum of two polynomials of the same inputs, output by output.

        Raises:
            OrthoFxError: another number of inputs or outputs.
        """
        if not isinstance(other, Polynomial):
            return NotImplemented
        if (self.inputs, self.outputs) != (other.inputs, other.outputs):
            raise OrthoFxError(
                f"sums are of polynomials with {self.inputs} inputs and {self.outputs} outputs; "
                f"got {other.inputs} and {other.outputs}"
            )
        exponents = np.concatenate([self.exponents, other.exponents])
        _, first, places = np.unique(ranks(tail_sums(exponents)), return_index=True, return_inverse=True)
        coefficients = np.zeros((len(first), self.outputs))
        np.add.at(coefficients, places, np.concatenate([self.coefficients, other.coefficients]))
        return Polynomial(exponents[first], coefficients)

    def derivative(self, input: int) -> Polynomial:
        """The partial derivative of every output with respect to one input, counted from 0.

        Raises:
            OrthoFxError: there is no such input.
        """
        if not is_integer(input) or not 0 <= input < self.inputs:
            raise OrthoFxError(f"input must be an integer from 0 to {self.inputs - 1}; got {input!r}")
        held = self.exponents[:, input] > 0
        if not held.any():
            return Polynomial(np.zeros((1, self.inputs), dtype=np.int64), np.zeros((1, self.outputs)))
        exponents = self.exponents[held].copy()
        coefficients = self.coefficients[held] * exponents[:, input, None]
        exponents[:, input] -= 1
        return Polynomial(exponents, coefficients)

    def format(self, *, digits: int = 4, most_terms: int | None = 20) -> str:
        """One line per output, "y0 = 0.5 + 1.2 x0 - 0.3 x0^2 x1", sorted by degree.

        Args:
            digits: significant digits of a coefficient.
            most_terms: terms to show of each output; None shows all. The line says how many more there are.
        """
        return "\n".join(self._line(j, digits, most_terms) for j in range(self.outputs))

    def _line(self, output: int, digits: int, most_terms: int | None) -> str:
        used = np.flatnonzero(self.coefficients[:, output])
        line = ""
        for t in used[:most_terms]:
            coefficient = float(self.coefficients[t, output])
            sign = "-" if coefficient < 0 else "+"
            line += f" {sign} " if line else sign.replace("+", "")
            factors = [
                f"x{i}" if power == 1 else f"x{i}^{power}"
                for i, power in enumerate(self.exponents[t].tolist())
                if power
            ]
            number = f"{abs(coefficient):.{digits}g}"
            line += " ".join(factors if number == "1" and factors else [number, *factors])
        if left := len(used) - len(used[:most_terms]):
            line += f" + {left} more term{'s' * (left > 1)}"
        return f"y{output} = {line or 0}"

    def __str__(self) -> str:
        return self.format()

    def __repr__(self) -> str:
        return f"Polynomial(inputs={self.inputs}, outputs={self.outputs}, degree={self.degree}, terms={self.terms})"


def to_polynomial(
    model: nn.Module,
    *,
    input_shape: int | tuple[int, ...] | None = None,
    most_coefficients: int = _MOST_COEFFICIENTS,
) -> Polynomial:
    """The polynomial that a network computes, exact up to the rounding of float64.

    The model may hold affine layers (Linear, convolutions, average pooling, batch normalisation in eval mode), sums,
    residuals, products (gated units), integer powers, changes of shape, and Hermite activations of any granularity
    without a clamp. It is traced by `torch.fx` and not changed; its parameters are read in float64.

    Args:
        model: a module that takes one tensor (batch, *input_shape) and returns one (batch, *outputs). The polynomial
            has the flattened inputs and outputs.
        input_shape: the shape of one sample; not needed if the input goes into a Linear layer.
        most_coefficients: the largest allowed number of coefficients in one layer, terms times values.

    Returns:
        A polynomial with at most C(inputs + degree, degree) terms. Activations are computed in the basis
        P_k = He_k / k!, by P_k = (x P_{k-1} - P_{k-2}) / k.

    Raises:
        OrthoFxError: a model that torch.fx cannot trace, an unknown or wrong input shape, an operation whose result is
            no polynomial (the message names it), or more coefficients than the limit.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 1), HermiteActivation(degree=2), nn.Linear(1, 1))
        >>> to_polynomial(model)
        Polynomial(inputs=2, outputs=1, degree=2, terms=6)
    """
    if not isinstance(model, nn.Module):
        raise OrthoFxError(f"the model must be a torch.nn.Module; got {type(model).__name__}")
    graph, modules = trace(model)
    (start, *others) = [node for node in graph.nodes if node.op == "placeholder"]
    for node in others:
        if not node.args:
            raise OrthoFxError(f"the model must take one tensor; it takes {node.target} as well")
    shape = _input_shape(start, modules, input_shape)
    monomials = Monomials(math.prod(shape), most_coefficients)
    values: dict[fx.Node, Any] = {start: _identity(monomials, shape)}
    for node in graph.nodes:
        if node.op == "output":
            return _finished(fx.node.map_arg(node.args[0], values.__getitem__))
        if node.op == "placeholder":
            values.setdefault(node, node.args[0] if node.args else None)
        elif node.op == "get_attr":
            values[node] = _attribute(modules[""], str(node.target))
        else:
            values[node] = _run(node, modules, values)
    raise AssertionError("a graph without an output")


def _run(node: fx.Node, modules: Mapping[str, nn.Module], values: Mapping[fx.Node, Any]) -> Any:
    arguments = fx.node.map_arg(node.args, values.__getitem__)
    keywords = fx.node.map_arg(node.kwargs, values.__getitem__)
    try:
        with torch.no_grad():
            value = run_node(node, modules, arguments, keywords)
        if isinstance(value, Dense):
            value.monomials.check(value.degree, value.shape.numel())
        return value
    except NotPolynomial as reason:
        raise OrthoFxError(f"{described(node, modules)}: {reason}") from None
    except Exception as error:  # PyTorch's errors for shapes that do not match
        message = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise OrthoFxError(f"{described(node, modules)}: {message}") from None


def _identity(monomials: Monomials, shape: tuple[int, ...]) -> Dense:
    """The inputs as polynomials: x_i is the (i + 1)-th monomial."""
    monomials.check(1, monomials.variables)
    coefficients = torch.cat([torch.zeros(1, monomials.variables), torch.eye(monomials.variables)]).double()
    return Dense(monomials, 1, coefficients.reshape(-1, *shape))


def _input_shape(
    start: fx.Node, modules: Mapping[str, nn.Module], given: int | tuple[int, ...] | None
) -> tuple[int, ...]:
    if given is not None:
        shape = (given,) if isinstance(given, int) else tuple(given)
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
            raise OrthoFxError(f"input_shape must be a number above zero or a tuple of them; got {given!r}")
        return shape
    node: fx.Node | None = start
    while node is not None:
        linear = next((modules[str(user.target)] for user in node.users if _is(user, modules, nn.Linear)), None)
        if linear is not None:
            assert isinstance(linear, nn.Linear)
            return (linear.in_features,)
        kept = (ExpansionActivation, nn.Identity, nn.Dropout)
        node = next((user for user in node.users if _is(user, modules, *kept)), None)
    raise OrthoFxError("the number of inputs is not known: pass input_shape=, the shape of one sample")


def _is(node: fx.Node, modules: Mapping[str, nn.Module], *classes: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], classes)


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _finished(value: Any) -> Polynomial:
    if not isinstance(value, Dense):
        raise OrthoFxError(f"the model must return one tensor that depends on its input; got {type(value).__name__}")
    coefficients = value.coefficients.reshape(len(value.coefficients), -1).numpy()
    exponents = value.monomials.exponents(value.degree)
    used = coefficients.any(axis=1) | (exponents.sum(axis=1) == 0)  # the zero polynomial keeps its constant term
    return Polynomial(exponents[used], coefficients[used])
