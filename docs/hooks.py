"""Puts what `ortho-fx COMMAND --help` prints in the place of `{{ help COMMAND }}`, for the pages to say what is."""

import os
import re

from ortho_fx.cli import make_parser


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"\{\{ help (.*?) \}\}", lambda match: f"```text\n{_help(match[1])}```", markdown)


def _help(command: str) -> str:
    parser = make_parser()
    if command != "ortho-fx":
        (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
        parser = commands[command]
    os.environ["COLUMNS"] = "100"
    return parser.format_help()
