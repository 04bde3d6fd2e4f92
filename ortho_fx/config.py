"""`ExpansionConfig`: the one description of an expansion, for API, backend options, command line and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ortho_fx.bases import BASES
from ortho_fx.errors import OrthoFxError

INITS = ("stable", "paper")
VERSION = 1


@dataclass(frozen=True)
class ExpansionConfig:
    """Which basis an activation is expanded in, and how it starts.

    Args:
        basis: "hermite", "fourier", "tropical" or "tropical_rational".
        degree: 1 to 32 for Hermite, 1 to 64 for the others; None takes the basis' default (3, 5, 5, 6).
        init: "stable" (forward and backward gains 1, and the signal's variance attracted to 1 as depth grows) or
            "paper" (the initialisation of arXiv 2502.01247).

    Raises:
        OrthoFxError: an unknown basis or init, or a degree out of range.
    """

    basis: str = "hermite"
    degree: int | None = None
    init: str = "stable"

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise OrthoFxError(f"basis must be one of {', '.join(BASES)}; got {self.basis!r}")
        basis = BASES[self.basis]
        if self.degree is None:
            object.__setattr__(self, "degree", basis.default_degree)
        elif isinstance(self.degree, bool) or not isinstance(self.degree, int) or self.degree not in basis.degrees:
            raise OrthoFxError(
                f"degree of {self.basis} must be an integer from {basis.degrees[0]} to {basis.degrees[-1]}; "
                f"got {self.degree!r}"
            )
        if self.init not in INITS:
            raise OrthoFxError(f"init must be one of {', '.join(INITS)}; got {self.init!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, with a version: what a checkpoint stores."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExpansionConfig:
        """The config of such values; unknown fields and versions from the future are errors."""
        values = dict(values)
        version = values.pop("version", VERSION)
        if version != VERSION:
            raise OrthoFxError(f"expansion config has version {version!r}; this release reads version {VERSION}")
        return cls(**check_fields(values))

    def __str__(self) -> str:
        return f"{self.basis} {self.degree}"


def check_fields(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` itself, once every key is known to be a field of `ExpansionConfig`."""
    allowed = [field.name for field in fields(ExpansionConfig)]
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise OrthoFxError(f"unknown option {', '.join(map(repr, unknown))}; options are {', '.join(allowed)}")
    return values
