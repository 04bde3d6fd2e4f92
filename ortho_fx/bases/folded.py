"""The forms of frozen expansions: functions of x and constants, by name.

- "polynomial": sum of c_k x^k.
- "recurrence": sum of a_k He_k(x) / k!, by Clenshaw's recurrence.
- "waves": a_0 + sum of A_k cos(w_k x - p_k).
- "harmonics": a_0 + sum of A_k cos(k w x) + B_k sin(k w x), by Horner's rule.
- "maximum": max over k of (s_k x + b_k).
- "difference": one maximum minus another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ortho_fx.bases.formula import TURNS, Value, counts_turns, multiply_add
from ortho_fx.numerics.moments import Array

# The name of a form, and its constants by name, each of shape (terms, groups).
Folded = tuple[str, dict[str, Array]]

# Clenshaw's recurrence runs in x / 8, so that the folded coefficients of all degrees are within 1e4 of one another.
STEP = 0.125


def _polynomial(x: Tensor, coefficients: Tensor) -> Tensor:
    *lower, highest = coefficients.unbind()
    y = lower[-1] + x * highest
    for coefficient in reversed(lower[:-1]):
        y = torch.addcmul(coefficient, y, x)
    return y


def _recurrence(x: Tensor, coefficients: Tensor) -> Tensor:
    """Clenshaw's recurrence: y = d_0, d_k = c_k + (x h) d_{k+1} - (k + 1) h^2 d_{k+2}, with c_k = a_k / (k! h^k)."""
    scaled = x * STEP
    *lower, after = coefficients.unbind()
    y = lower[-1] + scaled * after
    for k in range(len(lower) - 2, -1, -1):
        after, y = y, torch.addcmul(torch.add(lower[k], after, alpha=-(k + 1) * STEP**2), y, scaled)
    return y


def _waves(x: Tensor, constant: Tensor, amplitudes: Tensor, frequencies: Tensor, phases: Tensor) -> Tensor:
    y = constant[0]
    for amplitude, frequency, phase in zip(amplitudes.unbind(), frequencies.unbind(), phases.unbind(), strict=True):
        y = torch.addcmul(y, amplitude, torch.cos((x * frequency).sub_(phase)))
    return y


def _maximum(x: Tensor, slopes: Tensor, offsets: Tensor) -> Tensor:
    lines = zip(slopes.unbind(), offsets.unbind(), strict=True)
    return functools.reduce(torch.maximum, ((x * slope).add_(offset) for slope, offset in lines))


def _difference(x: Tensor, slopes: Tensor, offsets: Tensor, down: Tensor, below: Tensor) -> Tensor:
    return _maximum(x, slopes, offsets) - _maximum(x, down, below)


def circle(x: Value, frequency: Value) -> tuple[Value, Value]:
    """cos(w x) and sin(w x)."""
    if counts_turns(x):
        turns = (frequency[0] * TURNS) * x
        return turns.cos_of_turns(), turns.sin_of_turns()
    angle = frequency[0] * x
    return angle.cos(), angle.sin()


def harmonics(x: Value, constant: Value, cosines: Value, sines: Value, frequency: Value) -> Value:
    """a_0 + sum of A_k cos(k w x) + B_k sin(k w x)."""
    # Horner's rule for the real part of the sum of (A_k - i B_k) z^k, with z = exp(i w x).
    c, s = circle(x, frequency)
    minus_s = s * -1.0
    degree = len(cosines)
    u, v = cosines[degree - 1], sines[degree - 1]
    for k in range(degree - 2, -1, -1):
        u, v = (
            multiply_add(u, c, multiply_add(v, s, cosines[k])),
            multiply_add(v, c, multiply_add(u, minus_s, sines[k])),
        )
    return multiply_add(u, c, multiply_add(v, s, constant[0]))


FORMS: dict[str, Callable[..., Tensor]] = {
    "polynomial": _polynomial,
    "recurrence": _recurrence,
    "waves": _waves,
    "harmonics": harmonics,
    "maximum": _maximum,
    "difference": _difference,
}


def constant_polynomial(constant: Array) -> Folded:
    """A constant function."""
    return "polynomial", {"monomial_coefficients": np.concatenate([constant, np.zeros_like(constant)])}


def packed(needed: Any, *arrays: Array) -> list[Any]:
    """The mask of the needed rows, and each array with only the needed rows of each column, in order.

    A column with fewer needed rows is filled up with its first one; the mask is False there.
    """
    order = np.argsort(~needed, axis=0, kind="stable")[: needed.sum(axis=0).max()]
    present = np.take_along_axis(needed, order, axis=0)
    taken = [np.take_along_axis(array, order, axis=0) for array in arrays]
    return [present, *(np.where(present, rows, rows[:1]) for rows in taken)]
