"""What a user's Python file defines: functions and classes that an argument names as FILE.py:NAME."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ortho_fx.errors import OrthoFxError


def load_factory(file: Path, name: str) -> Callable[..., Any]:
    """The function or class of this name in a Python file, which is run for it.

    Raises:
        OrthoFxError: no such file, code that raises, or nothing of that name that can be called.
    """
    if not file.is_file():
        raise OrthoFxError(f"there is no file {file}")
    loader = importlib.machinery.SourceFileLoader(f"ortho_fx_model_{file.stem}", str(file))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # As Python does for a script: it can import files next to it, and dataclasses look up their module.
    sys.path.insert(0, str(file.parent.resolve()))
    sys.modules[spec.name] = module
    called(str(file), lambda: loader.exec_module(module))
    factory = getattr(module, name, None)
    if not callable(factory):
        came = "it has nothing of that name" if factory is None else f"it is of type {type(factory).__name__}"
        raise OrthoFxError(f"{file} must have a function or class {name}; {came}")
    return factory


def called(text: str, function: Callable[[], Any]) -> Any:
    """The result of a function of others, which `text` names.

    Raises:
        OrthoFxError: whatever it raises, in one line.
    """
    try:
        return function()
    except (Exception, SystemExit) as error:  # foreign code may raise anything
        first = next(iter(str(error).strip().splitlines()), "")
        raise OrthoFxError(f"{text} cannot be built: {type(error).__name__}{': ' * bool(first)}{first}") from error
