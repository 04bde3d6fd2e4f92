"""The kinds of expansions for parametrised tests: the bases, and Fourier with tied frequencies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ortho_fx import ExpansionConfig
from ortho_fx.activations import expansion as activations
from ortho_fx.bases import BASES, Basis

KINDS = (*BASES, "fourier tied")


def basis_of(kind: str) -> Basis:
    return BASES[kind.split()[0]]


def config_of(kind: str, degree: int | None = None, init: str = "stable", **settings: Any) -> ExpansionConfig:
    return ExpansionConfig(basis_of(kind).name, degree, init, tied=kind.endswith("tied"), **settings)


@contextlib.contextmanager
def bases_from_outside() -> Iterator[None]:
    """Removes bases that are registered in the block. Their operators stay, so a name can be used only once."""
    known = set(BASES)
    try:
        yield
    finally:
        for name in set(BASES) - known:
            delattr(activations, activations.class_name(BASES.pop(name)))
            del activations.CLASSES[name]
