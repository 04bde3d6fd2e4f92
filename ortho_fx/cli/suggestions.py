"""What the arguments of the commands can be completed to, and the file that holds it for `ortho_fx.cli.completion`.

`make completions` writes the file anew, after an option, a basis, an activation, a preset or a recipe has come or gone.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from ortho_fx.bases import BASES
from ortho_fx.bench.config import DTYPES, MODES, SUBJECTS
from ortho_fx.cli.completion import FILE, Completer, Suggestion
from ortho_fx.cli.export import ENDINGS, LIBRARIES
from ortho_fx.cli.fit import fitted
from ortho_fx.config import DEPTH, INITS, PRESET, ExpansionConfig
from ortho_fx.models.compare.activations import GATES, OWN
from ortho_fx.models.data.augment import AUGMENTS
from ortho_fx.models.recipe import DTYPES as TRAINING_DTYPES
from ortho_fx.models.recipe import LOGGERS, PARALLEL, TASKS, recipes
from ortho_fx.models.stock import NAMES
from ortho_fx.numerics.fit import WEIGHTS
from ortho_fx.passes.vocabulary.targets import BY_NAME

_WEIGHTS = [".safetensors", ".bin", ".pt", ".pth"]
_PICTURES = [".png", ".pdf", ".svg"]


def suggestions() -> dict[str, dict[str, Suggestion]]:
    """For each command, by the names of its arguments, what they can be completed to."""
    folder: Suggestion = {"files": []}
    presets = {name: list(task.presets) for name, task in TASKS.items()}
    devices: Suggestion = {"values": ["cpu", "cuda"]}
    granularity: Suggestion = {"values": ["layer", "model", "channel", "group:"]}
    stock = [OWN, *NAMES, *GATES]
    activations = [*stock, *(f"{name}:{ExpansionConfig(name).degree}" for name in BASES)]
    recipe: Suggestion = {"values": [*TASKS, *recipes()], "files": [".toml"]}
    run: dict[str, Suggestion] = {
        "recipe": recipe,
        "size": {"chosen_by": "recipe", "choices": presets},
        "start_from": {"files": _WEIGHTS},
        "init": {"values": [*INITS, DEPTH, PRESET], "files": [".json"]},
        "granularity": granularity,
        "data": {"values": [task.data for task in TASKS.values()], "files": [".txt"]},
        "augment": {"values": list(AUGMENTS)},
        "dtype": {"values": list(TRAINING_DTYPES)},
        "device": devices,
        "parallel": {"values": list(PARALLEL)},
        "log": {"values": list(LOGGERS)},
        "out": folder,
    }
    models = [name if size is None else f"{name}:{size}" for name in presets for size in (None, *presets[name])]
    return {
        "sites": {
            "model": {"values": [*models, "timm:", "hf:"], "files": [".py"]},
            "targets": {"values": list(BY_NAME)},
            "sharing": {"values": ["instance", "site"]},
        },
        "train": {**run, "basis": {"values": [*BASES, "none"]}, "stock": {"values": list(NAMES)}},
        "compare": {
            **run,
            "recipe": recipe | {"files": [".toml", ".py"]},
            "activations": {"values": activations},
            "reference": {"values": activations},
        },
        "data": {
            "source": {"values": ["standard-library"], "files": [".txt"]},
            "out": folder,
            "tokenizer": {"values": ["bytes", "bpe"], "files": [".json"]},
        },
        "harvest": {"runs": folder, "out": {"files": [".json"], "new": [".json"]}},
        "plot": {"runs": folder, "out": folder},
        "sample": {
            "weights": {"files": _WEIGHTS},
            "tokenizer": {"values": ["bytes"], "files": [".json"]},
        },
        "fit": {
            "function": {"values": list(fitted())},
            "basis": {"values": list(BASES)},
            "weight": {"values": [weight for weight in WEIGHTS if weight != "measured"]},
            "plot": {"files": _PICTURES, "new": _PICTURES},
        },
        "bench": {
            "what": {"values": list(SUBJECTS)},
            "bases": {"values": list(BASES)},
            "granularity": granularity,
            "device": devices,
            "dtype": {"values": list(DTYPES)},
            "size": {"chosen_by": "what", "choices": presets},
            "mode": {"values": list(MODES)},
            "json": {"files": [".json"], "new": [".json"]},
        },
        "export": {
            "weights": {"files": _WEIGHTS},
            "out": {"files": list(ENDINGS), "new": list(ENDINGS)},
            "to": {"values": list(LIBRARIES)},
            "tokenizer": {"values": ["bytes"], "files": [".json"]},
        },
        "doctor": {},
    }


def write(parser: argparse.ArgumentParser) -> None:
    """Writes the file for the parser of all commands."""
    FILE.write_text(json.dumps(described(parser), indent=1) + "\n", encoding="utf-8")


def suggest(parser: argparse.ArgumentParser) -> None:
    """Gives the arguments of the command line's parser their completers."""
    for name, command in _commands(parser).items():
        known = suggestions()[name]
        for action in command._actions:
            if action.dest in known:
                action.completer = Completer(known[action.dest])  # type: ignore[attr-defined]


def described(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The commands, their arguments and what these can be completed to, as JSON."""
    suggest(parser)
    commands = _commands(parser)
    helps = {action.dest: action.help for one in parser._actions for action in getattr(one, "_choices_actions", ())}
    return {
        "arguments": _arguments(parser),
        "commands": {
            name: {"help": helps[name], "arguments": _arguments(command)} for name, command in commands.items()
        },
    }


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    return commands


def _arguments(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        names = list(action.option_strings) or [action.dest]
        argument = {"names": names, "nargs": action.nargs, "help": action.help}
        completer = getattr(action, "completer", None)
        found.append(argument if completer is None else {**argument, "suggestion": completer.suggestion})
    return found
