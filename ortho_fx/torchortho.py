"""Reads what torchortho 0.1 saves: the state of one of its activations, converted to the parameters of ours.

Its formulas were worked out from its results. Each class has a key that no other has, which tells whose state it is.
Conversions are exact: every one renames, and the tropical one multiplies by a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ortho_fx.errors import OrthoFxError

State = Mapping[str, Tensor]


def hermite_parameters(state: State) -> dict[str, Tensor]:
    """HermiteActivation: y(x) = sum of coefficients_k He_k(x) / k!, which is our formula, from k = 0.

    `coeffs` and `grid`, the coefficients and the powers of the monomials of each He_k / k!, are constants, and so is
    `normalization_term`. Made with clamp=True, it takes z = L tanh(x / 2) in the place of x, with L = `clamp.lim_val`.

    Raises:
        OrthoFxError: a state with such a clamp, which no expansion of ours equals.
    """
    if "clamp.lim_val" in state:
        limit = state["clamp.lim_val"].item()
        raise OrthoFxError(
            f"clamp.lim_val: no expansion equals one of {limit:.4g} tanh(x / 2), so this state cannot be converted"
        )
    return _renamed(state, {"coefficients": "coefficients"})


def fourier_parameters(state: State) -> dict[str, Tensor]:
    """FourierActivation: y(x) = fundamental + sum of coefficients_k cos(grid_k x - phases_k) / k!, from k = 1.

    `normalization_term` is k!.
    """
    names = ("coefficients", "phases")
    return _renamed(state, {"fundamental": "constant", "grid": "frequencies", **{name: name for name in names}})


def tropical_parameters(state: State) -> dict[str, Tensor]:
    """TropicalActivation of degree n: y(x) = sqrt(2) / n * max over k of (powers_k x + coefficients_k), from k = 0."""
    lines = _renamed(state, {"powers": "slopes", "coefficients": "offsets"})
    if "offsets" not in lines:
        return lines
    dtype, scale = lines["offsets"].dtype, math.sqrt(2) / max(len(lines["offsets"]) - 1, 1)
    return {name: line.to(dtype) * scale for name, line in lines.items()}


def tropical_rational_parameters(state: State) -> dict[str, Tensor]:
    """TropicalRationalActivation: max_k (powers_num_k x + coefficients_num_k) less the same of `_denom`, from k = 0."""
    return _renamed(
        state,
        {
            "powers_num": "slopes",
            "coefficients_num": "offsets",
            "powers_denom": "denominator_slopes",
            "coefficients_denom": "denominator_offsets",
        },
    )


def _fundamental(frequencies: Tensor) -> Tensor:
    multiples = torch.arange(1, len(frequencies) + 1, device=frequencies.device) * frequencies[:1]
    if not torch.allclose(frequencies, multiples.to(frequencies.dtype), rtol=1e-6, atol=0.0):
        raise OrthoFxError("grid: the frequencies are no multiples of the first: load them with tied=False")
    return frequencies[:1]


def _renamed(state: State, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {ours: state[theirs] for theirs, ours in names.items() if theirs in state}


@dataclass(frozen=True)
class _Source:
    """A class of torchortho: the key that tells it, the basis that holds it, and the keys that are read or constant."""

    title: str
    key: str
    basis: str
    parameters: Callable[[State], dict[str, Tensor]]
    read: frozenset[str]


# Keys under act_init are the parameters of the function that a fit started from.
_SOURCES = (
    _Source(
        "HermiteActivation",
        "coeffs",
        "hermite",
        hermite_parameters,
        frozenset({"coefficients", "coeffs", "grid", "normalization_term", "act_init"}),
    ),
    _Source(
        "FourierActivation",
        "fundamental",
        "fourier",
        fourier_parameters,
        frozenset({"fundamental", "coefficients", "grid", "phases", "normalization_term", "act_init"}),
    ),
    _Source("TropicalActivation", "powers", "tropical", tropical_parameters, frozenset({"powers", "coefficients"})),
    _Source(
        "TropicalRationalActivation",
        "powers_num",
        "tropical_rational",
        tropical_rational_parameters,
        frozenset({"powers_num", "coefficients_num", "powers_denom", "coefficients_denom", "act_init"}),
    ),
)


def converted(basis: str, state_dict: State, prefix: str, tied: bool = False) -> State:
    """A state dict in which an activation of torchortho's under this prefix has become one of the basis.

    Any other state dict is returned as it is. Keys that torchortho does not write stay, for `load_state_dict` to find
    unexpected; those that are wanting are missing in ours as well.

    Raises:
        OrthoFxError: the state of another basis, or one that cannot be converted, as frequencies that are no multiples
            of one number cannot for an activation that ties them; the message opens with the key.
    """
    source = next((source for source in _SOURCES if prefix + source.key in state_dict), None)
    if source is None:
        return state_dict
    state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if source.basis != basis:
        raise OrthoFxError(
            f"{prefix}{source.key}: the state of torchortho's {source.title} is one of basis {source.basis!r}, "
            f"not {basis!r}"
        )
    try:
        parameters = source.parameters(state)
        if tied and "frequencies" in parameters:
            parameters["frequencies"] = _fundamental(parameters["frequencies"])
    except OrthoFxError as error:
        raise OrthoFxError(f"{prefix}{error}") from None
    rest = {key: value for key, value in state.items() if key.partition(".")[0] not in source.read}
    others = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
    return {**others, **{prefix + key: value for key, value in {**rest, **parameters}.items()}}
