"""Makes moved modules importable under their earlier names, for old pickles and scripts."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "ortho_fx.anneal": "ortho_fx.rewriting.anneal",
    "ortho_fx.freeze": "ortho_fx.activations.freeze",
    "ortho_fx.generated_code": "ortho_fx.operators.generated_code",
    "ortho_fx.initialisation": "ortho_fx.numerics.initialisation",
    "ortho_fx.moments": "ortho_fx.numerics.moments",
    "ortho_fx.least_squares": "ortho_fx.numerics.least_squares",
    "ortho_fx.passes.find": "ortho_fx.passes.search",
    "ortho_fx.passes.substitute": "ortho_fx.passes.vocabulary.expansions",
    "ortho_fx.passes.targets": "ortho_fx.passes.vocabulary.targets",
    "ortho_fx.models.files": "ortho_fx.tensor_files",
    "ortho_fx.models.expansion_files": "ortho_fx.models.weights.expansions",
    "ortho_fx.models.images": "ortho_fx.models.data.images",
    "ortho_fx.models.layouts": "ortho_fx.models.weights.layouts",
    "ortho_fx.models.loader": "ortho_fx.models.data.loader",
    "ortho_fx.models.run_files": "ortho_fx.models.runs.files",
    "ortho_fx.models.run_plots": "ortho_fx.models.runs.plots",
    "ortho_fx.models.text": "ortho_fx.models.data.text",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a moved module from its new place; both names then refer to the same module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        # The import system is about to overwrite `__spec__` with the specification of the old name.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_Finder())
