"""`Activation`: one activation of a comparison, from a text such as "fourier:5:tied,lr=0.002"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ortho_fx.bases import BASES
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.models.recipe import TrainConfig

# Settings that an activation may have of its own: those of its expansions, and those of its training.
_OF_EXPANSIONS = ("init", "granularity", "clamp", "calibrate", "expansion_lr")
_OWN = (*_OF_EXPANSIONS, "lr", "weight_decay", "beta2", "warmup", "min_lr", "clip")


@dataclass(frozen=True)
class Activation:
    """GELU (the model as it is) or a basis of expansions, with settings of its own.

    Args:
        basis: a basis, or "gelu".
        degree: of the basis.
        tied: as in `ExpansionConfig`.
        settings: names and values of `TrainConfig`.
    """

    basis: str
    degree: int | None = None
    tied: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Activation:
        """The activation that "BASIS[:DEGREE][:tied][,SETTING=VALUE...]" names.

        Raises:
            OrthoFxError: an unknown basis or setting, one that all activations have in common, or a wrong value.
        """
        head, *assigned = (part.strip() for part in text.split(","))
        basis, *parts = (part.strip() for part in head.lower().split(":"))
        if basis != "gelu" and basis not in BASES:
            raise OrthoFxError(
                f"an activation is gelu or one of {', '.join(BASES)}, then its degree and settings, as in "
                f"hermite:8,lr=0.01; got {text!r}"
            )
        settings: dict[str, Any] = {}
        for part in assigned:
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name in settings:
                raise OrthoFxError(f"settings of an activation are NAME=VALUE, each once; got {part!r} in {text!r}")
            settings[name] = _value(name, value, text)
        ordered = tuple(sorted(settings.items()))
        if basis == "gelu":
            wrong = [*parts, *(name for name in settings if name in _OF_EXPANSIONS)]
            if wrong:
                raise OrthoFxError(f"gelu has no expansion that {wrong[0]!r} could be of; got {text!r}")
            return cls(basis, settings=ordered)
        tied = parts[-1:] == ["tied"]
        degree = parts[: len(parts) - tied]
        if len(degree) > 1 or any(re.fullmatch("[0-9]+", part) is None for part in degree):
            raise OrthoFxError(f"after {basis} come its degree and tied, each with a colon before it; got {text!r}")
        return cls(basis, ExpansionConfig(basis, int(degree[0]) if degree else None).degree, tied, ordered)

    @property
    def label(self) -> str:
        """The text that `parse` reads, with the degree, and with the settings in sorted order."""
        parts = [self.basis, *([] if self.degree is None else [str(self.degree)]), *(["tied"] if self.tied else [])]
        return ",".join([":".join(parts), *(f"{name}={_text(value)}" for name, value in self.settings)])

    @property
    def slug(self) -> str:
        """The label as part of a directory's name."""
        return re.sub(r"[^A-Za-z0-9._+-]+", "-", self.label)

    def configure(self, config: TrainConfig, seed: int, out: Path) -> TrainConfig:
        """The run of this activation with a seed, in a directory of its own inside `out`.

        Raises:
            OrthoFxError: settings that exclude each other.
        """
        basis = "none" if self.basis == "gelu" else self.basis
        directory = str(out / f"{self.slug}-seed{seed}")
        own = dict(self.settings)
        return replace(config, basis=basis, degree=self.degree, tied=self.tied, seed=seed, out=directory, **own)


def choose_activations(texts: Sequence[str], reference: str, config: TrainConfig) -> list[Activation]:
    """The reference, and then the others in their order.

    Args:
        texts: activations, as `Activation.parse` reads them.
        reference: one of them, or one to add.
        config: the settings that they have in common.

    Raises:
        OrthoFxError: a text that is wrong, or two that describe the same run.
    """
    chosen: dict[TrainConfig, tuple[str, Activation]] = {}

    def run(activation: Activation) -> TrainConfig:
        return replace(activation.configure(config, config.seed, Path()), out=None)

    for text in texts:
        activation = Activation.parse(text)
        same = chosen.setdefault(run(activation), (text, activation))
        if same[1] is not activation:
            raise OrthoFxError(f"activations {same[0]!r} and {text!r} are the same")
    first = Activation.parse(reference)
    _, first = chosen.pop(run(first), (reference, first))
    return [first, *(activation for _, activation in chosen.values())]


def _value(name: str, value: str, text: str) -> Any:
    """The value of a setting, in the type of its field."""
    setting = next((s for s in TrainConfig.settings() if s.name == name), None)
    if setting is None or name not in _OWN:
        reason = "is no setting" if setting is None else "is the same for all activations"
        raise OrthoFxError(f"{name!r} in {text!r} {reason}; an activation may set {', '.join(_OWN)}")
    kind = setting.metadata["type"]
    if value == "none" and setting.default is None:
        return None
    try:
        return {"true": True, "false": False}[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        raise OrthoFxError(f"{name} must be {kinds[kind]}; got {value!r} in {text!r}") from None


def _text(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
