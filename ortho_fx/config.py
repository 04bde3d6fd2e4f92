"""`ExpansionConfig`: the description of an expansion, shared by API, backend options, command line and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ortho_fx.arguments import is_integer, is_number
from ortho_fx.bases import BASES, basis_named
from ortho_fx.errors import OrthoFxError

INITS = ("stable", "paper", "calibrated", "fit", "exact")
# A start from a file: "preset:FILE".
PRESET = "preset:"
# A start for a plain network of L layers: "depth:L".
DEPTH = "depth:"
_DEEPEST = 10_000
_DEFAULT_BASIS = "fourier"
# A degree without a basis is one of a polynomial.
_BASIS_OF_A_DEGREE = "hermite"
VERSION = 1
_GRANULARITY = re.compile("model|layer|channel|group:[1-9][0-9]*")
# "hermite", "hermite3" and "hermite 3".
_SHORT = re.compile("(.*?) ?([0-9]+)?", re.DOTALL)


@dataclass(frozen=True)
class ExpansionConfig:
    """The settings of an expansion: its basis and degree, its initialisation, and which channels share it.

    Args:
        basis: "fourier", "hermite", "tropical", "tropical_rational", "chebyshev", "safe_rational", "piecewise_power",
            "gelu_series", "silu_series", "relu_squared_series", or the name of a basis from `register_basis`. None is
            "fourier", but "hermite" with a degree, so that `ExpansionConfig(degree=3)` is the polynomial of degree 3.
        degree: the number of terms; the class of each basis states its range. None is the default of the basis.
        init: "stable" (forward and backward gains are 1 for inputs N(0, 1), and the variance of a signal converges to 1
            over many layers), "paper" (the initialisation of arXiv 2502.01247), "calibrated" ("stable" for the measured
            mean and standard deviation of each site's inputs), "fit" (the closest fit to the replaced activation) or
            "exact" (the replaced activation itself, for a basis that holds it: "gelu_series" for GELU, "tropical" for
            ReLU, "piecewise_power" for ReLU^2), "depth:L" ("stable", and bent less, for a plain network of L layers,
            from 1 to 10,000; `ortho_fx.bases.deep` has the formula), or "preset:FILE" (a function that
            `ortho-fx harvest` has written, or the name of one that comes with the package).
        granularity: "layer" (one expansion per site), "channel" (one per channel), "group:N" (one for each of N groups
            of neighbouring channels) or "model" (one for all sites with this config at which `rewrite_` replaces the
            same activation; a module that is made without a rewrite is then as with "layer").
        clamp: inputs are clamped to mean +- clamp standard deviations; beyond these bounds the expansion is constant.
            None does not clamp. Mean and deviation are those of the initialisation: N(0, 1) until `calibrate_` measures
            others.
        tied: whether the frequencies of a Fourier expansion are w_k = k w with one learnable number w, instead of n
            learnable numbers. Forward and backward then take about two thirds of the time.
        gated: whether the output is a factor of a product, as in SwiGLU: y = f(a) b. The start for measured inputs is
            then f_1((x - mean) / std) instead of std f_1((x - mean) / std), so that the product has the variance of b.

    Raises:
        OrthoFxError: an unknown basis, init or granularity, a degree or a depth out of range, a clamp that is not above
            zero, a clamp with init "exact", a gate with init "depth:L", or `tied` for a basis without frequencies.

    Source: Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247.
    """

    basis: str = None  # type: ignore[assignment]  # always a name after __post_init__
    degree: int | None = None
    init: str = "stable"
    granularity: str = "layer"
    clamp: float | None = None
    tied: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", basis_of(self.basis, self.degree))
        basis = basis_named(self.basis)
        if self.degree is None:
            object.__setattr__(self, "degree", basis.default_degree)
        elif not is_integer(self.degree) or self.degree not in basis.degrees:
            raise OrthoFxError(
                f"degree of {self.basis} must be an integer from {basis.degrees[0]} to {basis.degrees[-1]}; "
                f"got {self.degree!r}"
            )
        if isinstance(self.init, str) and self.init.startswith(DEPTH):
            depth_of(self.init)
            if self.gated:
                raise OrthoFxError(f"init {self.init!r} is for layers without gates; got gated=True: use init 'stable'")
        elif self.init not in INITS and not (
            isinstance(self.init, str) and self.init.removeprefix(PRESET) != self.init
        ):
            raise OrthoFxError(f"init must be one of {', '.join(INITS)}, depth:L or preset:FILE; got {self.init!r}")
        if self.init == "paper" and not basis.has_paper_start:
            others = ", ".join(init for init in INITS if init != self.init)
            raise OrthoFxError(f"init of {self.basis} must be one of {others}; the paper has no start for it")
        if not isinstance(self.granularity, str) or not _GRANULARITY.fullmatch(self.granularity):
            raise OrthoFxError(
                f'granularity must be "model", "layer", "channel" or "group:N"; got {self.granularity!r}'
            )
        if self.clamp is not None:
            if not is_number(self.clamp) or self.clamp <= 0:
                raise OrthoFxError(f"clamp must be a finite number above zero, or None; got {self.clamp!r}")
            if self.init == "exact":
                raise OrthoFxError("init 'exact' has no clamp: a clamped function is not the activation it replaces")
            object.__setattr__(self, "clamp", float(self.clamp))
        if not isinstance(self.tied, bool):
            raise OrthoFxError(f"tied must be True or False; got {self.tied!r}")
        if not isinstance(self.gated, bool):
            raise OrthoFxError(f"gated must be True or False; got {self.gated!r}")
        if self.tied and not basis.tieable:
            raise OrthoFxError(f"tied is for the {what_ties()}; {self.basis} has none")

    @property
    def size(self) -> int:
        """The number of learnable numbers in one expansion."""
        assert self.degree is not None
        return sum(p.size(self.degree, self.tied) for p in basis_named(self.basis).parameters if p.learnable)

    @property
    def by_channel(self) -> bool:
        """Whether the channels of a site have different expansions."""
        return self.granularity not in ("model", "layer")

    def groups(self, channels: int | None) -> int | None:
        """The number of expansions for a site with this number of channels; None if all channels share one.

        Raises:
            OrthoFxError: the number of channels is unknown, or no multiple of the number of groups.
        """
        if not self.by_channel:
            return None
        if channels is None:
            raise OrthoFxError(f"granularity {self.granularity!r} needs the number of channels")
        if not is_integer(channels):
            raise OrthoFxError(f"channels must be an integer; got {channels!r}")
        groups = channels if self.granularity == "channel" else int(self.granularity.removeprefix("group:"))
        if channels < 1 or channels % groups:
            raise OrthoFxError(f"{channels} channels do not divide into {groups} groups")
        return groups

    @classmethod
    def of(cls, value: object) -> ExpansionConfig:
        """The config that a short form means: a config, a basis ("hermite"), one with its degree ("hermite3"), a map.

        Raises:
            OrthoFxError: another value, or a wrong setting.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            name, degree = _SHORT.fullmatch(value).groups()  # type: ignore[union-attr]
            # A registered basis may end with a digit.
            return cls(value) if value in BASES or degree is None else cls(name, int(degree))
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise OrthoFxError(
            f'an expansion is an ExpansionConfig, a name such as "hermite3" or a map of fields; got {value!r}'
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, with a version, for checkpoints; `gated` only if it is set."""
        values = asdict(self)
        if not self.gated:
            del values["gated"]
        return {"version": VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExpansionConfig:
        """The config from the values of `to_dict`.

        Raises:
            OrthoFxError: no map, an unknown field, or another version.
        """
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
        if self.gated:
            parts.append("gated")
        if self.granularity != "layer":
            parts.append(f"a {self.granularity}" if self.granularity in ("model", "channel") else self.granularity)
        if self.clamp is not None:
            parts.append(f"clamp {self.clamp:g}")
        return " ".join(parts)


@dataclass(frozen=True)
class SiteConfig:
    """The expansion of one site, in enough detail to make it again without inputs.

    Attributes:
        expansion: the config.
        channels: number of channels of a granularity "channel" or "group:N".
        channel_dim: their dimension; None if it follows from the input's shape.
        form: the form of a frozen expansion; None for one that learns.
        sizes: the shape of each constant of a frozen expansion.
    """

    expansion: ExpansionConfig
    channels: int | None = None
    channel_dim: int | None = None
    form: str | None = None
    sizes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, those of the config beside the others."""
        values = self.expansion.to_dict()
        if self.channels is not None:
            values |= {"channels": self.channels, "channel_dim": self.channel_dim}
        if self.form is not None:
            values["frozen"] = {"form": self.form, "sizes": [[name, list(shape)] for name, shape in self.sizes]}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiteConfig:
        """The description from the values of `to_dict`.

        Raises:
            OrthoFxError: no map, an unknown or wrong field, or another version.
        """
        if not isinstance(values, Mapping):
            raise OrthoFxError(f"the config of a site must be a map of its fields; got {type(values).__name__}")
        rest = dict(values)
        channels, channel_dim, frozen = (rest.pop(name, None) for name in ("channels", "channel_dim", "frozen"))
        config = ExpansionConfig.from_dict(rest)
        for name, number in (("channels", channels), ("channel_dim", channel_dim)):
            if number is not None and not is_integer(number):
                raise OrthoFxError(f"{name} must be an integer; got {number!r}")
        config.groups(channels)
        if frozen is None:
            return cls(config, channels, channel_dim)
        try:
            # A list, because their order counts, and JSON is often written with sorted keys.
            sizes = tuple((str(name), tuple(int(size) for size in shape)) for name, shape in frozen["sizes"])
            return cls(config, channels, channel_dim, str(frozen["form"]), sizes)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise OrthoFxError(f"frozen must hold the form and the sizes of its constants; got {frozen!r}") from None


def described_sites(
    expansions: Mapping[str, Mapping[str, Any]], channels: Mapping[str, Sequence[Any]]
) -> dict[str, SiteConfig]:
    """The expansions of a file of `ortho_fx.models.weights`, by site; it holds number and dimension of channels apart.

    Raises:
        OrthoFxError: an unknown or wrong field, or another version.
        TypeError, AttributeError: values of another structure.
    """
    return {
        site: SiteConfig.from_dict(
            {**fields, **dict(zip(("channels", "channel_dim"), channels.get(site, ()), strict=False))}
        )
        for site, fields in expansions.items()
    }


def configs_of(value: object) -> ExpansionConfig | Mapping[str, ExpansionConfig | None] | None:
    """What `rewrite_` takes as a config, with `ExpansionConfig.of` of every short form in it.

    A map is a config if it has a basis, or no other keys than fields, and holds no configs.

    Raises:
        OrthoFxError: a value that is no config.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return ExpansionConfig.of(value)
    allowed = {field.name for field in fields(ExpansionConfig)} | {"version"}
    held = [one for one in value.values() if isinstance(one, ExpansionConfig | Mapping)]
    if value and not held and ("basis" in value or set(value) <= allowed):
        return ExpansionConfig.of(value)
    found = {}
    for pattern, one in value.items():
        try:
            found[pattern] = None if one is None else ExpansionConfig.of(one)
        except OrthoFxError as error:
            raise OrthoFxError(f"the config of {pattern!r}: {error}") from None
    return found


def basis_of(basis: str | None, degree: object) -> str:
    """The basis that is meant; see `ExpansionConfig`."""
    if basis is not None:
        return basis
    return _DEFAULT_BASIS if degree is None else _BASIS_OF_A_DEGREE


def default_basis() -> str:
    """The basis without a name, as text for helps."""
    return f"{basis_of(None, None)}, but {basis_of(None, 1)} with a degree"


def depth_of(init: str) -> int:
    """L of an init "depth:L".

    Raises:
        OrthoFxError: L is no integer from 1 to 10,000.
    """
    digits = init.removeprefix(DEPTH)
    if not (digits.isascii() and digits.isdigit() and 1 <= int(digits) <= _DEEPEST):
        raise OrthoFxError(f"init depth:L needs the number of layers L, from 1 to {_DEEPEST}; got {init!r}")
    return int(digits)


def what_ties() -> str:
    """The parameters that `tied` applies to, with their bases, as text."""
    return ", ".join(f"{p.name} of {basis.name}" for basis in BASES.values() for p in basis.parameters if p.tieable)


def check_fields(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns `values` if every key is a field of `ExpansionConfig`.

    Raises:
        OrthoFxError: an unknown key.
    """
    allowed = [field.name for field in fields(ExpansionConfig)]
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise OrthoFxError(f"unknown option {', '.join(map(repr, unknown))}; options are {', '.join(allowed)}")
    return values
