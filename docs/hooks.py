"""Makes parts of the site's pages: what `{{ help COMMAND }}` prints, formulas as MathML, notebooks, and result files.

MathML is part of HTML, so a page with formulas needs no script. A notebook becomes a page of Markdown with its outputs,
and its pictures become files.
"""

import base64
import html
import json
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ortho_fx.cli import make_parser

# What pymdownx.arithmatex makes of $...$ and $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[\(\[](.*?)\\[\)\]]</\1>', re.DOTALL)


# Links of pages in a folder of docs/ to files beside docs/, which are copied into the site.
RESULTS = ("benchmarks/results", "examples/results", "examples/pictures")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for folder in RESULTS:
        for path in sorted((Path(config.docs_dir).parent / folder).iterdir()):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for path in sorted((Path(config.docs_dir) / "notebooks").glob("*.ipynb")):
        page, pictures = notebook_page(json.loads(path.read_text(encoding="utf-8")), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def notebook_page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their file names."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                parts.append("```text\n" + "".join(output["text"]).rstrip("\n") + "\n```")
            else:
                file = f"{name}_{len(pictures)}.png"
                pictures[file] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![picture {len(pictures)} of the notebook]({file})")
    parts.insert(1, f"[Download the notebook]({name}.ipynb)")
    return "\n\n".join(parts) + "\n", pictures


def on_page_markdown(markdown: str, **_: object) -> str:
    for folder in RESULTS:
        markdown = markdown.replace(f"](../../{folder}/", "](../results/")
    markdown = re.sub(r"\]\((\.\./notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)
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
