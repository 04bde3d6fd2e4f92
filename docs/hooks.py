"""Makes parts of the site: pages beside docs/, what `{{ help COMMAND }}` prints, formulas as MathML, and notebooks.

Examples, benchmarks and the passes have their pages in their folders, where readers of the repository find them. The
site takes them from there, with their pictures and result files, and each link leads where it leads in the repository.
MathML is part of HTML, so a page with formulas needs no script. A notebook becomes a page of Markdown with its outputs,
and its pictures become files.
"""

import base64
import html
import itertools
import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from ortho_fx.cli import make_parser

ROOT = Path(__file__).parent.parent
# What the site takes from beside docs/, under the same paths.
BESIDE = ("CHANGELOG.md", "*/README.md", "passes/*/README.md", "*/results/*", "examples/pictures/*")

# What pymdownx.arithmatex makes of $...$ and $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[\(\[](.*?)\\[\)\]]</\1>', re.DOTALL)
TABLE = re.compile("<table>.*?</table>", re.DOTALL)
LINK = re.compile(r"(?<=\]\()[^)#:\s]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
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


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    uri = page.file.src_uri
    markdown = LINK.sub(lambda link: link_on_site(link[0], uri), markdown)
    markdown = re.sub(r"\]\((\.\./notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)
    return re.sub(r"\{\{ help (.*?) \}\}", lambda match: f"```text\n{_help(match[1])}```", markdown)


def link_on_site(link: str, uri: str) -> str:
    """Where a link of the page `uri` leads on the site, if it leads to a file of the repository."""
    beside = (ROOT / uri).exists()
    path = posixpath.normpath(posixpath.join("" if beside else "docs", posixpath.dirname(uri), link))
    if not (ROOT / path).exists():
        return link
    return posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(uri) or ".")


def on_page_content(content: str, **_: object) -> str:
    return TABLE.sub(_labelled, FORMULA.sub(_typeset, content))


def _labelled(found: re.Match[str]) -> str:
    """A table of two or three columns; a phone stacks its cells, each after the head of its column."""
    table = found[0]
    heads = [html.escape(re.sub("<.*?>", "", head)) for head in re.findall(r"<th[^>]*>(.*?)</th>", table)]
    if len(heads) not in (2, 3):
        return table
    labels = itertools.cycle(heads)
    return re.sub("<td", lambda _: f'<td data-label="{next(labels)}"', table).replace("<table>", "<table data-cards>")


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
