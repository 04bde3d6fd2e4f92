"""`ortho-fx harvest`: takes what runs have learned, for others to start from."""

from __future__ import annotations

import argparse

from ortho_fx.cli.mistakes import say
from ortho_fx.cli.parser import Commands, Number, Parser


def add(commands: Commands[Parser]) -> None:
    command = commands.add_parser(
        "harvest",
        help="make a preset of what runs have learned",
        description="Averages the expansions that runs have learned, over layers, groups and runs, and writes the "
        "closest expansion as a preset.",
        epilog="example: ortho-fx harvest runs/a runs/b --out sine.json --error 0.2; then "
        "ortho-fx train gpt2 --basis fourier --degree 1 --init preset:sine.json",
        allow_abbrev=False,
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    command.add_argument("--out", required=True, metavar="FILE", help="the preset")
    command.add_argument(
        "--error",
        type=Number(),
        help="drop terms: the lowest degree that is this close to the mean function, as a share of that function's "
        "deviation (default: the degree of the runs)",
    )
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    from ortho_fx.models.runs.harvest import harvest

    preset = harvest(parsed.runs, parsed.error)
    preset.write(parsed.out)
    say(preset)
    say(f"{parsed.out}: start from it by init preset:{parsed.out}")
    return 0
