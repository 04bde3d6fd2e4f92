"""`ortho-fx compare`: trains one model with several activations, over several seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ortho_fx.cli.mistakes import say_or_end
from ortho_fx.cli.parser import Commands, Parser, Whole
from ortho_fx.cli.train import add_settings, config_of

# Settings that each activation has of its own, or that the comparison decides.
_WITHOUT = ("basis", "degree", "tied", "gated", "freeze", "stock", "seed", "out")


def add(commands: Commands[Parser]) -> None:
    command = commands.add_parser(
        "compare",
        help="train one model with several activations, over several seeds",
        description="Trains the same model on the same batches with each activation and seed, at equal steps and at "
        "equal time. It measures time per step and peak memory in turns, and writes tables and a picture. Called "
        "again, it goes on where it was.",
        epilog="an activation is BASIS[:DEGREE][:tied][:gated][:frozen], a stock activation such as gelu, "
        "relu_squared, gelu:calibrated, polynorm or torchortho:hermite:3, one of swiglu and geglu, or own for the "
        "model as it is; settings follow as ,NAME=VALUE. example: ortho-fx compare gpt2 --activations gelu swiglu "
        "hermite:3 fourier:5,lr=0.002 --seeds 3 --tune 5 --out runs/compare",
        allow_abbrev=False,
    )
    add_settings(command, without=_WITHOUT, also=", or FILE.py:FACTORY with a model, batches and a loss")
    command.add_argument(
        "--activations", nargs="+", required=True, metavar="ACTIVATION", help="what is compared, such as hermite:3"
    )
    command.add_argument("--reference", default="gelu", help="what the others are read against (default gelu)")
    command.add_argument("--seeds", type=Whole(1, 10_000), default=3, help="seeds of each, counted from 0 (default 3)")
    command.add_argument(
        "--tune",
        type=Whole(0, 1000),
        default=0,
        metavar="N",
        help="trials of each activation's learning rates, on a seed that is not reported (default 0: none)",
    )
    command.add_argument("--tune-steps", type=Whole(1), metavar="N", help="steps of a trial (default: those of a run)")
    command.add_argument(
        "--jobs",
        type=Whole(1, 1000),
        default=1,
        help="runs trained at a time, on one thread each if several (default 1)",
    )
    command.add_argument("--out", required=True, help="folder of the runs, the tables and the picture")
    command.add_argument(
        "--no-timing", dest="timing", action="store_false", help="leave out time, memory and runs of equal time"
    )
    command.add_argument(
        "--no-equal-time", dest="equal_time", action="store_false", help="leave out the runs of equal time"
    )
    command.add_argument(
        "--no-equal-steps",
        dest="equal_steps",
        action="store_false",
        help="leave out the runs of equal steps, but for the reference's",
    )
    command.add_argument("--overwrite", action="store_true", help="start anew where the folder has a comparison")
    command.set_defaults(run=run, trains=True)


def run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed, custom=True)
    from ortho_fx.cli.plugins import load_plugins
    from ortho_fx.models.compare.runs import Budget, compare

    to_go_on = f"the same command{' without --overwrite' if parsed.overwrite else ''} goes on"
    budget = Budget(
        parsed.seeds,
        timing=parsed.timing,
        equal_time=parsed.equal_time,
        equal_steps=parsed.equal_steps,
        tune=parsed.tune,
        tune_steps=parsed.tune_steps,
        jobs=parsed.jobs,
    )
    comparison = compare(
        config,
        parsed.activations,
        budget,
        out=Path(parsed.out),
        reference=parsed.reference,
        overwrite=parsed.overwrite,
        to_go_on=to_go_on,
        prepare=load_plugins,
        progress=lambda line: say_or_end(line, f"the runs that are done are kept in {parsed.out}: {to_go_on}"),
    )
    say_or_end(comparison, f"{parsed.out} is complete")
    return 0
