"""Answers a shell's request for completions of `ortho-fx`, without importing PyTorch, which takes seconds.

The parser of the commands needs PyTorch: its options come from the bases and the models. So `completions.json` beside
this file holds what a completion needs of it: the commands, their options, and the values that these take.
`make completions` writes the file. Where a package that adds bases or activations is installed, the
parser itself answers, since these are values as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

FILE = Path(__file__).with_name("completions.json")
PLUGINS = ("ortho_fx.bases", "ortho_fx.activations")


class Suggestion(TypedDict, total=False):
    """What an option can be completed to. Its keys add up.

    `values` are words, and `files` the endings of files that exist; folders go with them, and no ending stands for
    folders alone. `new` are endings that a name of a new file gets. `chosen_by` names another argument, whose value
    starts with a key of `choices`, and `choices` holds the words for it.
    """

    values: list[str]
    files: list[str]
    new: list[str]
    chosen_by: str
    choices: dict[str, list[str]]


class Completer:
    """The completions of one argument, in the form in which argcomplete asks for them."""

    def __init__(self, suggestion: Suggestion) -> None:
        self.suggestion = suggestion

    def __call__(self, prefix: str, parsed_args: argparse.Namespace | None = None, **_: object) -> list[str]:
        found = list(self.suggestion.get("values", ()))
        if "choices" in self.suggestion:
            choices, chosen = self.suggestion["choices"], getattr(parsed_args, self.suggestion["chosen_by"], None)
            of_it = [words for key, words in choices.items() if str(chosen).startswith(key)] or list(choices.values())
            found += dict.fromkeys(word for words in of_it for word in words)
        if "files" in self.suggestion:
            found += _files(prefix, tuple(self.suggestion["files"]))
        new = self.suggestion.get("new", [])
        if prefix and not prefix.endswith(("/", *new)):
            stem, dot, begun = prefix.rpartition(".")
            found += [stem + ending for ending in new if dot and ending.startswith(dot + begun)] or [
                prefix + ending for ending in new
            ]
        return found


def answer() -> None:
    """Answers and ends the process; returns if the parser itself has to answer, or argcomplete is not installed."""
    import importlib.metadata

    if any(importlib.metadata.entry_points(group=group) for group in PLUGINS):
        return
    try:
        import argcomplete

        parser = _parser(json.loads(FILE.read_text(encoding="utf-8")))
    except (ImportError, OSError, ValueError):
        return
    argcomplete.autocomplete(parser)


def asked() -> bool:
    """Whether this process is the command `ortho-fx`, run by a shell for completions."""
    return "_ARGCOMPLETE" in os.environ and Path(sys.argv[0]).name.startswith("ortho-fx")


def _parser(described: Mapping[str, Any]) -> argparse.ArgumentParser:
    """A parser with the arguments of ours, as far as completions go."""
    parser = argparse.ArgumentParser(prog="ortho-fx", allow_abbrev=False)
    _add(parser, described["arguments"])
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, command in described["commands"].items():
        _add(commands.add_parser(name, help=command["help"], allow_abbrev=False), command["arguments"])
    return parser


def _add(parser: argparse.ArgumentParser, arguments: list[dict[str, Any]]) -> None:
    for argument in arguments:
        names, suggestion = argument["names"], argument.get("suggestion")
        settings: dict[str, Any] = {"help": argument["help"]}
        if argument["nargs"] == 0:
            settings["action"] = "store_true"
        elif argument["nargs"] is not None:
            settings["nargs"] = argument["nargs"]
        action = parser.add_argument(*names, **settings)
        if suggestion:
            action.completer = Completer(suggestion)  # type: ignore[attr-defined]


def _files(prefix: str, endings: tuple[str, ...]) -> Iterator[str]:
    """The folders, and the files with one of these endings, whose path starts with a prefix."""
    folder, _, start = prefix.rpartition("/")
    shown = prefix[: len(prefix) - len(start)]
    try:
        entries = sorted(os.scandir(Path(shown).expanduser() if folder or shown else "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start):
            continue
        if entry.is_dir():
            yield f"{shown}{entry.name}/"
        elif endings and entry.name.endswith(endings):
            yield shown + entry.name
