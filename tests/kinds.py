"""What tests of every kind of expansion run over: the bases, and Fourier with tied frequencies."""

from __future__ import annotations

from typing import Any

from ortho_fx import ExpansionConfig
from ortho_fx.bases import BASES, Basis

KINDS = (*BASES, "fourier tied")


def basis_of(kind: str) -> Basis:
    return BASES[kind.split()[0]]


def config_of(kind: str, degree: int | None = None, init: str = "stable", **settings: Any) -> ExpansionConfig:
    return ExpansionConfig(basis_of(kind).name, degree, init, tied=kind.endswith("tied"), **settings)
