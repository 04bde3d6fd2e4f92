"""`ortho-fx compare`: trains one model with several activations, over several seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ortho_fx.cli.mistakes import say_or_end
from ortho_fx.cli.parser import Commands, Parser, Whole
from ortho_fx.cli.train import add_settings, config_of


def add(commands: Commands[Parser]) -> None:
    command = commands.add_parser(
        "compare",
        help="train one model with several activations, over several seeds",
        description="Trains the same model on the same batches with each activation and seed, measures time per step "
        "and peak memory in turns, and writes a table and a picture. Called again, it goes on where it was.",
        epilog="an activation is gelu or BASIS[:DEGREE][:tied][,SETTING=VALUE...]. example: ortho-fx compare gpt2 "
        "--size small --steps 1500 --activations gelu hermite:3 fourier:5,lr=0.002 --seeds 3 --out runs/compare",
        allow_abbrev=False,
    )
    add_settings(command, without=("basis", "degree", "tied", "seed", "out"))
    command.add_argument(
        "--activations", nargs="+", required=True, metavar="ACTIVATION", help="what is compared, such as hermite:3"
    )
    command.add_argument("--reference", default="gelu", help="what the others are read against (default gelu)")
    command.add_argument("--seeds", type=Whole(1, 10_000), default=3, help="seeds of each, counted from 0 (default 3)")
    command.add_argument("--out", required=True, help="folder of the runs, the table and the picture")
    command.add_argument("--no-timing", dest="timing", action="store_false", help="leave time and memory out")
    command.add_argument("--overwrite", action="store_true", help="start anew where the folder has a comparison")
    command.set_defaults(run=run, trains=True)


def run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed)
    from ortho_fx.models.compare.runs import compare

    to_go_on = f"the same command{' without --overwrite' if parsed.overwrite else ''} goes on"
    comparison = compare(
        config,
        parsed.activations,
        seeds=parsed.seeds,
        out=Path(parsed.out),
        reference=parsed.reference,
        timing=parsed.timing,
        overwrite=parsed.overwrite,
        to_go_on=to_go_on,
        progress=lambda line: say_or_end(line, f"the runs that are done are kept in {parsed.out}: {to_go_on}"),
    )
    say_or_end(comparison, f"{parsed.out} is complete")
    return 0
