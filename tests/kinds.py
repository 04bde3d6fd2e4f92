"""The kinds of expansions for parametrised tests: the bases, and Fourier with tied frequencies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ortho_fx import ExpansionConfig
from ortho_fx.activations import expansion as activations
from ortho_fx.bases import BASES, Basis
from ortho_fx.passes.vocabulary import targets

KINDS = (*BASES, "fourier tied")
# For tests that take long because they compile: one basis for each set of operations and way to prepare parameters.
COMPILED_BASES = ("hermite", "fourier", "tropical", "tropical_rational", "safe_rational", "gelu_series")
COMPILED = (*COMPILED_BASES, "fourier tied")


def basis_of(kind: str) -> Basis:
    return BASES[kind.split()[0]]


def config_of(kind: str, degree: int | None = None, init: str = "stable", **settings: Any) -> ExpansionConfig:
    """A config of this kind; a degree that its basis does not have becomes the nearest one."""
    basis = basis_of(kind)
    if degree is not None:
        degree = min(max(degree, basis.degrees[0]), basis.degrees[-1])
    return ExpansionConfig(basis.name, degree, init, tied=kind.endswith("tied"), **settings)


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


@contextlib.contextmanager
def activations_from_outside() -> Iterator[None]:
    """Forgets the activations that are registered inside."""
    known = len(targets.TARGETS)
    try:
        yield
    finally:
        for target in targets.TARGETS[known:]:
            del targets.BY_NAME[target.name]
        del targets.TARGETS[known:]
        vars(targets.EVERY_TARGET).update(vars(targets.TargetTable(targets.TARGETS)))
        for kept in targets._caches:
            kept.cache_clear()
