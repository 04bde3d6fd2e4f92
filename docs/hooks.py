"""Makes parts of the site's pages: what `{{ help COMMAND }}` prints, formulas as MathML, and the linked result files.

MathML is part of HTML, so a page with formulas needs no script.
"""

import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ortho_fx.cli import make_parser

# What pymdownx.arithmatex makes of $...$ and $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[\(\[](.*?)\\[\)\]]</\1>', re.DOTALL)


# Links of pages in a folder of docs/ to files beside docs/, which are copied into the site.
RESULTS = "../../benchmarks/results/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted((Path(config.docs_dir).parent / "benchmarks" / "results").iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    markdown = markdown.replace(f"]({RESULTS}", "](../results/")
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
