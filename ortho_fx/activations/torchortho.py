"""Reads what torchortho 0.1 saves: the state of one of its activations, converted to the parameters of ours.

Its formulas were worked out from its results. Each class has a key that no other has, which tells whose state it is.
Conversions are exact: every one renames, and the tropical one multiplies by a constant. Each is in the file of the
basis that it is for.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ortho_fx.bases import BASES
from ortho_fx.errors import OrthoFxError


def converted(basis: str, state_dict: Mapping[str, Tensor], prefix: str, tied: bool = False) -> Mapping[str, Tensor]:
    """A state dict in which an activation of torchortho's under this prefix has become one of the basis.

    Any other state dict is returned as it is. Keys that torchortho does not write stay, for `load_state_dict` to find
    unexpected; those that are wanting are missing in ours as well.

    Raises:
        OrthoFxError: the state of another basis, or one that cannot be converted, as frequencies that are no multiples
            of one number cannot for an activation that ties them; the message opens with the key.
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
