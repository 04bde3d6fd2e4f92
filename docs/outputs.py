"""Runs the code of the pages, and keeps the outputs that they show equal to what the code prints.

    python docs/outputs.py                   all pages; writes outputs that differ, and names their pages
    python docs/outputs.py README rewrite    these pages

A block of the language `text` is what the Python block or the commands directly above it printed. Every page starts
with `torch.manual_seed(0)`. `difference` says which numbers may differ from machine to machine. An output that differs
in these alone is kept. A page whose libraries are not installed is left.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ortho_fx import cli
from ortho_fx.errors import OrthoFxError
from ortho_fx.models import gpt2

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "passes" / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The first line of a Python block that is a file.
FILE = re.compile(r"# ([\w/]+\.py)\n")
# Options that shorten the commands of a page, which take long, and a GPT-2 in the place of the size "tiny".
SHORT = "--no-compile --steps 2 --batch-size 8 --eval-every 1 --warmup 1".split()
SMALL = gpt2.GPT2Config(vocabulary=256, context=16, layers=1, heads=2, width=32)

VERSION = re.compile(r"\d+\.\d+\.\d+(?:\+\w+)?")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
UNIT_OF_TIME = re.compile(r" ?(?:s|ms|µs|minutes?|seconds?)\b")


def read(page: Path) -> tuple[dict[str, Any], list[str], list[str], str]:
    """Runs the blocks of a page in the current folder, in order.

    Returns:
        The namespace of its Python; its commands; how each shown output differs from what was printed; and the page
        with what was printed in the place of outputs that differ.
    """
    torch.manual_seed(0)
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": page.stem}
    commands: list[str] = []
    differences: list[str] = []
    pieces, written, printed = [], 0, ""
    for found in BLOCK.finditer(text):
        language, block = found.groups()
        if language == "text":
            if reason := difference(block, printed):
                differences.append(reason)
                pieces += [text[written : found.start(2)], printed]
                written = found.end(2)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as output:
            commands += _run(language, block, namespace, page)
        # Lines that end in spaces would not survive an editor.
        printed = re.sub(r"[ ]+$", "", output.getvalue(), flags=re.MULTILINE)
    return namespace, commands, differences, "".join([*pieces, text[written:]])


def _run(language: str, block: str, namespace: dict[str, Any], page: Path) -> Iterator[str]:
    """Runs one block, and yields its commands."""
    if language == "python" and (named := FILE.match(block)):
        Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(named[1]).write_text(block)
    elif language == "python":
        # The block is a file, since the rewrite reads the source of classes from their files.
        file = Path(f"block{len(list(Path.cwd().glob('block*.py')))}.py").absolute()
        file.write_text(block)
        exec(compile(block, str(file), "exec"), namespace)
    elif language == "toml":
        name, recipe = block.removeprefix("# ").split("\n", 1)
        Path(name).write_text(recipe)
    elif language in ("", "console"):
        for command in re.findall(r"^(?:\$ )?ortho-fx (.*)$", block, flags=re.MULTILINE):
            arguments = shlex.split(command)
            shorten = arguments[0] in ("train", "compare")
            arguments += SHORT if shorten else []
            arguments += ["--seeds", "1", "--no-equal-time"] if arguments[0] == "compare" else []
            with mock.patch.dict(gpt2.PRESETS, {"tiny": SMALL} if shorten else {}):
                assert cli.main(arguments) == 0, command
            yield command
    elif language != "bash":  # commands that need more than one machine
        raise OrthoFxError(f"{page.name} has a block of {language!r}")


def difference(shown: str, printed: str) -> str | None:
    """The first line in which a shown output is not what was printed, or None.

    Numbers may differ where machines do: a time or a version by anything, and any other number with a decimal point or
    an exponent by 2 %, by one unit of its last digit, or by 1e-5, which is rounding. Integers must be equal. Columns
    may be wider.
    """
    ours, today = shown.splitlines(), printed.splitlines()
    for one, other in zip(ours, today, strict=False):
        if not _alike(one, other):
            return f"shown: {one}\nprinted: {other}"
    return None if len(ours) == len(today) else f"shown are {len(ours)} lines, and printed {len(today)}:\n{printed}"


def _alike(one: str, other: str) -> bool:
    one, other = (VERSION.sub("VERSION", line) for line in (one, other))
    numbers = [list(NUMBER.finditer(line)) for line in (one, other)]
    words = [re.sub(r"[\s─-]+", " ", NUMBER.sub("0", line)).strip() for line in (one, other)]
    return words[0] == words[1] and all(
        _close(a[0], b[0]) or UNIT_OF_TIME.match(one, a.end()) is not None for a, b in zip(*numbers, strict=True)
    )


def _close(one: str, other: str) -> bool:
    if one == other:
        return True
    if not re.search("[.e]", one + other):
        return False
    a, b = (float(number.replace(",", "")) for number in (one, other))
    digit = 10.0 ** (int(one.partition("e")[2] or 0) - len(one.partition("e")[0].partition(".")[2]))
    return abs(a - b) <= max(0.02 * abs(b), 1.01 * digit, 1e-5)


def _renewed(page: Path) -> str:
    """Writes the page anew if an output differs; returns what there is to say."""
    os.environ["COLUMNS"] = "100"
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        try:
            _, _, differences, text = read(page)
        except ImportError as error:
            return f"left: {error}"
        finally:
            os.chdir(ROOT)
    if differences:
        page.write_text(text)
    return "; ".join(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", metavar="NAME", help="the page NAME.md; all pages when omitted")
    names = parser.parse_args().pages
    pages = [page for page in PAGES if page.stem in names or (not names and page.stem != "command_line")]
    # A page may register bases and activations, so each has a process.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        for page, said in zip(pages, processes.imap(_renewed, pages), strict=True):
            if said:
                print(f"{page.relative_to(ROOT)}: {said}")


if __name__ == "__main__":
    main()
