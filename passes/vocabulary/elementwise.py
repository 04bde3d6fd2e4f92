"""The elementwise operations that activation formulas are written in.

A formula such as 0.5 x (1 + tanh(...)) is recognised by evaluating it. That is safe and meaningful only if each of its
steps acts on every element separately.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Nonlinear operations; a formula needs at least one to be an activation.
_BENDING = (
    *("sigmoid", "tanh", "erf", "exp", "expm1", "log1p", "relu"),
    *("relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus", "hardtanh", "hardsigmoid", "hardswish"),
    *("selu", "celu", "softsign", "logsigmoid"),
)
_PLAIN = (
    *("abs", "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "neg", "negative", "pow"),
    *("square", "sqrt", "reciprocal", "clamp", "clamp_min", "clamp_max", "clip", "maximum", "minimum", "where", "sign"),
    *("float", "double", "clone"),
)


def _operations() -> dict[Callable[..., Any], str]:
    """Elementwise functions, each with its name in a formula in `torch`, `F` and `math`."""
    found: dict[Callable[..., Any], str] = {}
    for prefix, module in (("F", F), ("torch", torch)):
        for name in (*_BENDING, *_PLAIN):
            for spelled in (name, f"{name}_"):
                function = getattr(module, spelled, None)
                if callable(function) and (module is torch or name in _BENDING):
                    found[function] = f"{prefix}.{name}"
    for name in ("sqrt", "exp", "erf", "tanh", "pow", "log", "log1p", "expm1"):
        found[getattr(math, name)] = f"math.{name}"
    return found


OPERATIONS: Mapping[Callable[..., Any], str] = _operations()
METHODS = frozenset(
    spelled for name in (*_BENDING, *_PLAIN) for spelled in (name, f"{name}_") if hasattr(Tensor, spelled)
)
_BENDING_NAMES = frozenset(name for base in _BENDING for name in (base, f"{base}_"))
ARITHMETIC: Mapping[Callable[..., Any], str] = {
    getattr(operator, f"{in_place}{name}"): name
    for name in ("add", "sub", "mul", "truediv", "pow")
    for in_place in ("", "i")
} | {operator.neg: "neg", operator.pos: "pos"}


def operation_of(function: object) -> str | None:
    """The name of an elementwise function in a formula; None for other objects."""
    try:
        return OPERATIONS.get(function)  # type: ignore[call-overload]
    except Exception:  # unhashable, or with a hash of its own that raises
        return None


def bends(name: str) -> bool:
    """Whether the operation of this name, given without its module, is nonlinear (see `_BENDING`)."""
    return name in _BENDING_NAMES
