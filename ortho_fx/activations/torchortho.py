"""Converts the saved state of a torchortho 0.1 activation to the parameters of ours.

Its formulas were worked out from its results. Each of its classes has a key that no other class has, which identifies
the class of a state. Conversions are exact: they rename keys, and the tropical one also multiplies by a constant. Each
conversion is in the file of its basis.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ortho_fx.bases import BASES
from ortho_fx.errors import OrthoFxError


def converted(basis: str, state_dict: Mapping[str, Tensor], prefix: str, tied: bool = False) -> Mapping[str, Tensor]:
    """The state dict, with the state of a torchortho activation under this prefix converted to the basis.

    Any other state dict is returned unchanged. Keys that torchortho does not write stay, and `load_state_dict` reports
    them as unexpected. Keys that the state lacks are also missing in the result.

    Raises:
        OrthoFxError: the state belongs to another basis, or cannot be converted, for example because the activation
            ties its frequencies and those of the state are no multiples of one number. The message starts with the key.
    """
    known = ((each.name, each.torchortho) for each in BASES.values() if each.torchortho is not None)
    its_basis, source = next(((name, one) for name, one in known if prefix + one.key in state_dict), (None, None))
    if source is None:
        return state_dict
    state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if its_basis != basis:
        raise OrthoFxError(
            f"{prefix}{source.key}: the state of torchortho's {source.title} is one of basis {its_basis!r}, "
            f"not {basis!r}"
        )
    try:
        parameters = source.parameters(state, tied)
    except OrthoFxError as error:
        raise OrthoFxError(f"{prefix}{error}") from None
    rest = {key: value for key, value in state.items() if key.partition(".")[0] not in source.read}
    others = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
    return {**others, **{prefix + key: value for key, value in {**rest, **parameters}.items()}}
