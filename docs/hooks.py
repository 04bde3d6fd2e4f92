"""Makes parts of the site's pages: what `{{ help COMMAND }}` prints, and formulas as MathML.

MathML is part of HTML, so a page with formulas needs no script.
"""

import html
import os
import re

from latex2mathml.converter import convert

from ortho_fx.cli import make_parser

# What pymdownx.arithmatex makes of $...$ and $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[\(\[](.*?)\\[\)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"\{\{ help (.*?) \}\}", lambda match: f"```text\n{_help(match[1])}```", markdown)


def on_page_content(content: str, **_: object) -> str:
    return FORMULA.sub(_typeset, content)


def _typeset(found: re.Match[str]) -> str:
    display = {"span": "inline", "div": "block"}[found[1]]
    return f'<{found[1]} class="arithmatex">{convert(html.unescape(found[2]), display=display)}</{found[1]}>'


def _help(command: str) -> str:
    parser = make_parser()
    if command != "ortho-fx":
        (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
        parser = commands[command]
    os.environ["COLUMNS"] = "100"
    return parser.format_help()
