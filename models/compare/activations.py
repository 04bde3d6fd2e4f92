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
from ortho_fx.models.custom import is_custom
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.stock import NAMES, Stock

# Settings that an activation may have of its own: those of its expansions, and those of its training.
_OF_COEFFICIENTS = ("expansion_lr", "expansion_decay", "expansion_min_lr")
_OF_EXPANSIONS = ("init", "granularity", "clamp", "calibrate", *_OF_COEFFICIENTS)
_OWN = (*_OF_EXPANSIONS, "lr", "weight_decay", "beta2", "warmup", "min_lr", "clip")
# The model as it is, and stock activations as the gate of a product.
OWN, GATES = "own", {"swiglu": "silu", "geglu": "gelu"}
_MARKS = ("tied", "gated", "frozen")
# The activation of each of our models, as it is published.
_BUILT_IN = {"gpt2": "gelu_tanh", "convnext": "gelu"}


@dataclass(frozen=True)
class Activation:
    """An activation with settings of its own: a basis of expansions, a stock activation, or that of the model.

    Args:
        basis: a basis, or None.
        degree: of the basis.
        stock: a stock activation, or None; without a basis and a stock activation the model stays as it is.
        tied, frozen: as `ExpansionConfig` and `TrainConfig.freeze` have it.
        gated: whether the model has gated MLPs of as many parameters, with this activation as the gate.
        settings: names and values of `TrainConfig`.
    """

    basis: str | None = None
    degree: int | None = None
    stock: Stock | None = None
    tied: bool = False
    frozen: bool = False
    gated: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Activation:
        """The activation of a text.

        - "BASIS[:DEGREE][:tied][:gated][:frozen]": expansions; `frozen` keeps their start
        - "NAME[:DEGREE][:rescaled or calibrated][:gated]": a stock activation, of `ortho_fx.models.stock`
        - "swiglu", "geglu": short for "silu:gated" and "gelu:gated"
        - "own": the model as it is

        Settings follow, each as ",NAME=VALUE".

        Raises:
            OrthoFxError: an unknown basis or setting, one that all activations have in common, or a wrong value.
        """
        head, *assigned = (part.strip() for part in text.split(","))
        name, *parts = (part.strip() for part in head.lower().split(":"))
        settings: dict[str, Any] = {}
        for part in assigned:
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or key in settings:
                raise OrthoFxError(f"settings of an activation are NAME=VALUE, each once; got {part!r} in {text!r}")
            settings[key] = _value(key, value, text)
        ordered = tuple(sorted(settings.items()))
        if name in BASES:
            return _of_basis(name, parts, ordered, text)
        wrong = next((key for key in settings if key in _OF_EXPANSIONS), None)
        if wrong is not None:
            raise OrthoFxError(f"{head} has no expansion that {wrong!r} could be of; got {text!r}")
        if name == OWN and not parts:
            return cls(settings=ordered)
        gated = name in GATES or parts[-1:] == ["gated"]
        rest = [GATES.get(name, name), *(parts[:-1] if parts[-1:] == ["gated"] else parts)]
        if not any(":".join(rest).startswith(one) for one in NAMES) or rest == [""]:
            known = ", ".join((OWN, *NAMES, *GATES))
            raise OrthoFxError(
                f"an activation is one of {known}, or one of the bases {', '.join(BASES)}, then its degree and "
                f"settings, as in hermite:8,lr=0.01; got {text!r}"
            )
        stock = Stock.parse(":".join(rest))
        if gated and stock.name == "polynorm":
            raise OrthoFxError(f"polynorm needs all of a row, so it is no gate; got {text!r}")
        return cls(stock=stock, gated=gated, settings=ordered)

    @property
    def name(self) -> str:
        """The label without the settings."""
        if self.basis is not None:
            marks = [mark for mark in _MARKS if getattr(self, mark)]
            return ":".join([self.basis, str(self.degree), *marks])
        if self.stock is None:
            return OWN
        short = {stock: gate for gate, stock in GATES.items()}
        if self.gated and self.stock.start is None and self.stock.name in short:
            return short[self.stock.name]
        return f"{self.stock}{':gated' * self.gated}"

    @property
    def label(self) -> str:
        """The text that `parse` reads, with the degree, and with the settings in sorted order."""
        return ",".join([self.name, *(f"{name}={_text(value)}" for name, value in self.settings)])

    @property
    def slug(self) -> str:
        """The label as part of a directory's name."""
        return re.sub(r"[^A-Za-z0-9._+-]+", "-", self.label)

    @property
    def learns(self) -> bool:
        """Whether it has expansions whose parameters learn, and so a rate of their own."""
        return self.basis is not None and not self.frozen

    def configure(self, config: TrainConfig, seed: int, out: Path) -> TrainConfig:
        """The run of this activation with a seed, in a directory of its own inside `out`.

        Raises:
            OrthoFxError: settings that exclude each other, or gates for a model of a user's file.
        """
        if self.gated and is_custom(config.model):
            raise OrthoFxError(f"{self.label} needs a model with gates; make them in {config.model}, without :gated")
        own = dict(self.settings)
        if not self.learns:  # what all expansions have in common is not for this one
            own |= {"expansion_lr": None, "expansion_decay": 0.0, "expansion_min_lr": None}
        return replace(
            config,
            basis=self.basis or "none",
            degree=self.degree,
            tied=self.tied,
            gated=self.gated,
            freeze=self.frozen,
            stock=self._stock_of(config.model),
            seed=seed,
            out=str(out / f"{self.slug}-seed{seed}"),
            **own,
        )

    def _stock_of(self, model: str) -> str | None:
        """The stock activation to put into a model; None if the model has it already."""
        if self.stock is None:
            return None
        built_in = None if is_custom(model) else "silu" if self.gated else _BUILT_IN[model]
        return None if str(self.stock) == built_in else str(self.stock)


def _of_basis(name: str, parts: list[str], settings: tuple[tuple[str, Any], ...], text: str) -> Activation:
    marks = [part for part in parts if part in _MARKS]
    degree = parts[: len(parts) - len(marks)]
    if parts[len(degree) :] != marks or len(set(marks)) != len(marks) or len(degree) > 1:
        degree = ["?"]
    if any(re.fullmatch("[0-9]+", part) is None for part in degree):
        raise OrthoFxError(
            f"after {name} come its degree and then {', '.join(_MARKS)}, each with a colon before it; got {text!r}"
        )
    wrong = next((key for key, _ in settings if key in _OF_COEFFICIENTS), None)
    if "frozen" in marks and wrong is not None:
        raise OrthoFxError(f"frozen expansions have no {wrong}; got {text!r}")
    chosen = ExpansionConfig(name, int(degree[0]) if degree else None, tied="tied" in marks)
    tied, gated, frozen = (mark in marks for mark in _MARKS)
    return Activation(name, chosen.degree, tied=tied, gated=gated, frozen=frozen, settings=settings)


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
