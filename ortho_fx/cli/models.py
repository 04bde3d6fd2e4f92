"""The argument MODEL of the command line: the models that it can name, and how each is built.

Models are built on the meta device, where parameters have shapes but no numbers, so that even the largest are fast.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.user_files import called, load_factory

FORMS = "gpt2[:SIZE], convnext[:SIZE], timm:NAME, hf:TYPE, hf:FOLDER or FILE.py:FACTORY"


def build_model(text: str) -> nn.Module:
    """The model that an argument names, with parameters on the meta device if it can be built there.

    - `gpt2`, `convnext`, `gpt2:124m`: our models, with the preset "tiny" or the named one
    - `timm:resnet50`: a model of timm
    - `hf:llama`: the base model of a model type of transformers, with the default config of that type
    - `hf:FOLDER`: the base model for the config.json in a folder
    - `FILE.py:FACTORY`: the result of a function or class in a Python file, called without arguments

    Output of libraries and factories goes to stderr.

    Raises:
        OrthoFxError: another form, an unknown name, a missing library, or a model that cannot be built.
    """
    kind, _, name = text.partition(":")
    file, _, factory = text.rpartition(":")
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in ("gpt2", "convnext"):
            return _own(text, kind, name or "tiny")
        if kind == "timm" and name:
            return _timm(text, name)
        if kind == "hf" and name:
            return _transformers(text, name)
        if file.endswith(".py") and factory:
            return _on_meta(text, load_factory(Path(file), factory))
    raise OrthoFxError(f"MODEL must be {FORMS}; got {text!r}")


def _own(text: str, kind: str, size: str) -> nn.Module:
    from ortho_fx.models.recipe import TASKS

    task = TASKS[kind]
    if size not in task.presets:
        raise OrthoFxError(f"sizes of {kind} are {', '.join(task.presets)}; got {text!r}")
    with torch.device("meta"):
        return task.model(task.presets[size])


def _timm(text: str, name: str) -> nn.Module:
    timm = _library("timm", text)
    if not timm.is_model(name):
        raise OrthoFxError(f"timm has no model {name!r}{_similar(name, timm.list_models())}")
    return _on_meta(text, lambda: timm.create_model(name))


def _transformers(text: str, name: str) -> nn.Module:
    transformers = _library("transformers", text)
    transformers.logging.set_verbosity_error()
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise OrthoFxError(f"{name} has no config.json")
        # Never run code from the folder, and never use the network.
        config = called(
            text, lambda: transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        )
    elif name in transformers.CONFIG_MAPPING:
        config = called(text, lambda: transformers.AutoConfig.for_model(name))
    else:
        similar = _similar(name, transformers.CONFIG_MAPPING.keys())
        raise OrthoFxError(f"{name!r} is no model type of transformers, and no folder{similar}")
    # Only on the meta device: the parameters of a default config may not fit into memory.
    with torch.device("meta"):
        return called(text, lambda: transformers.AutoModel.from_config(config))


def _on_meta(text: str, factory: Callable[[], Any]) -> nn.Module:
    """The result of a factory, on the meta device unless the factory needs numbers."""
    try:
        with torch.device("meta"):
            model = factory()
        needs_numbers = isinstance(model, nn.Module) and _keeps_tensors(model)
    except (Exception, SystemExit):
        needs_numbers = True
    if needs_numbers:
        model = called(text, factory)
    if not isinstance(model, nn.Module):
        raise OrthoFxError(f"{text} must be a torch.nn.Module; got {type(model).__name__}")
    return model


def _keeps_tensors(model: nn.Module) -> bool:
    """Whether a module keeps tensors as plain attributes; then its function depends on their values."""
    return any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())


def _library(name: str, text: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise OrthoFxError(f"{text} needs {name}: pip install {name}") from None
        raise OrthoFxError(f"{text} needs {name}, which cannot be imported: {error}") from None
    except Exception as error:
        raise OrthoFxError(f"{text} needs {name}, which cannot be imported: {error}") from error


def _similar(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f"; similar are {', '.join(near)}" if near else ""
