"""`ortho-fx plot`: plots training runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ortho_fx.cli.mistakes import say
from ortho_fx.cli.parser import Commands, Parser


def add(commands: Commands[Parser]) -> None:
    command = commands.add_parser(
        "plot",
        help="draw runs: loss curves, and every activation before and after",
        description="Draws the loss curves of one or several runs, the norm of their gradients, how far expansions "
        "moved, and every site's activation before and after training.",
        epilog="example: ortho-fx plot runs/gpt2-tiny-hermite3 runs/gpt2-tiny-gelu --out pictures",
        allow_abbrev=False,
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    command.add_argument("--out", help="folder of the pictures (default: plots in the first run)")
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    from ortho_fx.models.runs.files import read_run
    from ortho_fx.models.runs.plots import plot_runs

    runs = [read_run(Path(directory)) for directory in parsed.runs]
    for path in plot_runs(runs, Path(parsed.out) if parsed.out else Path(parsed.runs[0]) / "plots"):
        say(path)
    return 0
