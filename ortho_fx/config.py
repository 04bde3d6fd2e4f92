"""`ExpansionConfig`: the one description of an expansion, for API, backend options, command line and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ortho_fx.arguments import is_integer, is_number
from ortho_fx.bases import BASES, basis_named
from ortho_fx.errors import OrthoFxError

INITS = ("stable", "paper", "calibrated", "fit")
VERSION = 1
_GRANULARITY = re.compile("layer|channel|group:[1-9][0-9]*")


@dataclass(frozen=True)
class ExpansionConfig:
    """Which basis an activation is expanded in, and how it starts.

    Args:
        basis: "hermite", "fourier", "tropical", "tropical_rational", or one that `register_basis` has added.
        degree: 1 to 32 for Hermite, 1 to 64 for our others; None takes the basis' default (3, 5, 5, 6).
        init: "stable" (forward and backward gains 1 for inputs N(0, 1), and the signal's variance attracted to 1 as
            depth grows), "paper" (the initialisation of arXiv 2502.01247), "calibrated" (stable, for the mean and the
            standard deviation that each site's inputs are measured to have) or "fit" (the activation that is replaced,
            as closely as the basis can).
        granularity: "layer" (one expansion a site), "channel" (one a channel) or "group:N" (one for each of N groups of
            neighbouring channels).
        clamp: None, or the number of standard deviations to either side of the mean at which inputs are cut off: the
            expansion is constant beyond. The mean and the deviation are those of the initialisation, N(0, 1) until
            `calibrate_` measures others.
        tied: whether the frequencies of a Fourier expansion are the multiples k w of one number w that learns, in the
            place of one number each. Forward and backward take about two thirds of the time.

    Raises:
        OrthoFxError: an unknown basis, init or granularity, a degree out of range, a clamp that is not above zero, or
            tied for a basis without frequencies.
    """

    basis: str = "hermite"
    degree: int | None = None
    init: str = "stable"
    granularity: str = "layer"
    clamp: float | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        basis = basis_named(self.basis)
        if self.degree is None:
            object.__setattr__(self, "degree", basis.default_degree)
        elif not is_integer(self.degree) or self.degree not in basis.degrees:
            raise OrthoFxError(
                f"degree of {self.basis} must be an integer from {basis.degrees[0]} to {basis.degrees[-1]}; "
                f"got {self.degree!r}"
            )
        if self.init not in INITS:
            raise OrthoFxError(f"init must be one of {', '.join(INITS)}; got {self.init!r}")
        if self.init == "paper" and not basis.has_paper_start:
            others = ", ".join(init for init in INITS if init != self.init)
            raise OrthoFxError(f"init of {self.basis} must be one of {others}; the paper has no start for it")
        if not isinstance(self.granularity, str) or not _GRANULARITY.fullmatch(self.granularity):
            raise OrthoFxError(f'granularity must be "layer", "channel" or "group:N"; got {self.granularity!r}')
        if self.clamp is not None:
            if not is_number(self.clamp) or self.clamp <= 0:
                raise OrthoFxError(f"clamp must be a finite number above zero, or None; got {self.clamp!r}")
            object.__setattr__(self, "clamp", float(self.clamp))
        if not isinstance(self.tied, bool):
            raise OrthoFxError(f"tied must be True or False; got {self.tied!r}")
        if self.tied and not basis.tieable:
            raise OrthoFxError(f"tied is for the {what_ties()}; {self.basis} has none")

    @property
    def size(self) -> int:
        """How many numbers one expansion learns."""
        assert self.degree is not None
        return sum(p.size(self.degree, self.tied) for p in basis_named(self.basis).parameters if p.learnable)

    def groups(self, channels: int | None) -> int | None:
        """How many expansions a site with so many channels has; None for one that all share.

        Raises:
            OrthoFxError: channels that are not known, or do not divide into the groups.
        """
        if self.granularity == "layer":
            return None
        if channels is None:
            raise OrthoFxError(f"granularity {self.granularity!r} needs the number of channels")
        if not is_integer(channels):
            raise OrthoFxError(f"channels must be an integer; got {channels!r}")
        groups = channels if self.granularity == "channel" else int(self.granularity.removeprefix("group:"))
        if channels < 1 or channels % groups:
            raise OrthoFxError(f"{channels} channels do not divide into {groups} groups")
        return groups

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, with a version: what a checkpoint stores."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExpansionConfig:
        """The config of such values; unknown fields and versions from the future are errors."""
        if not isinstance(values, Mapping):
            raise OrthoFxError(f"expansion config must be a map of its fields; got {type(values).__name__}")
        values = dict(values)
        version = values.pop("version", VERSION)
        if version != VERSION:
            raise OrthoFxError(f"expansion config has version {version!r}; this release reads version {VERSION}")
        return cls(**check_fields(values))

    def __str__(self) -> str:
        parts = [self.basis, str(self.degree)]
        if self.tied:
            parts.append("tied")
        if self.granularity != "layer":
            parts.append(f"a {self.granularity}" if self.granularity == "channel" else self.granularity)
        if self.clamp is not None:
            parts.append(f"clamp {self.clamp:g}")
        return " ".join(parts)


def what_ties() -> str:
    """What `tied` is for: the parameters that can be tied, and their bases."""
    return ", ".join(f"{p.name} of {basis.name}" for basis in BASES.values() for p in basis.parameters if p.tieable)


def check_fields(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` itself, once every key is known to be a field of `ExpansionConfig`."""
    allowed = [field.name for field in fields(ExpansionConfig)]
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise OrthoFxError(f"unknown option {', '.join(map(repr, unknown))}; options are {', '.join(allowed)}")
    return values
