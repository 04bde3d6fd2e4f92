"""The command line, `ortho-fx`: one subcommand a task, exit code 2 and one line for whatever the user got wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ortho_fx import __version__
from ortho_fx.bases import BASES
from ortho_fx.config import INITS, ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.fit import fit
from ortho_fx.passes.targets import BY_NAME, choose_targets

if TYPE_CHECKING:
    from ortho_fx.models.training import Result

_TIED = "make the frequencies of fourier multiples of one that learns"


class _Parser(argparse.ArgumentParser):
    """Prints a mistake as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise OrthoFxError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for a user's mistake, 130 for an interrupt."""
    try:
        parsed = _parser().parse_args(arguments)
        return parsed.run(parsed)
    except OrthoFxError as error:
        print(f"ortho-fx: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("ortho-fx: interrupted; go on with --resume", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ortho-fx", description="Learnable activations for PyTorch models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ortho-fx {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_fit(commands)
    _add_bench(commands)
    return parser


def _add_fit(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser(
        "fit",
        help="fit an expansion to a known activation",
        description="Fits an expansion to an activation function in value and derivative, and prints its parameters "
        "and how far the two are apart.",
        epilog="examples: ortho-fx fit gelu --basis hermite --degree 8 --plot gelu.png; "
        "ortho-fx fit relu --basis fourier --weight uniform --interval -5 5",
        allow_abbrev=False,
    )
    command.add_argument("function", help=f"what is fitted: {', '.join(BY_NAME)}")
    command.add_argument("--basis", default="hermite", help=f"{', '.join(BASES)} (default hermite)")
    command.add_argument("--degree", type=int, help="degree of the expansion (default: that of the basis)")
    command.add_argument("--clamp", type=float, help="cut inputs off so many standard deviations from the mean")
    command.add_argument("--tied", action="store_true", help=_TIED)
    command.add_argument("--weight", default="gaussian", help="gaussian (default), or uniform on the interval")
    command.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range of x")
    command.add_argument("--mean", type=float, default=0.0, help="mean of the gaussian weight (default 0)")
    command.add_argument("--std", type=float, default=1.0, help="standard deviation of the gaussian weight (default 1)")
    command.add_argument(
        "--derivative-weight", type=float, default=0.0, help="weight of the derivative's error beside the value's"
    )
    command.add_argument("--plot", metavar="FILE", help="draw the fit (png, pdf, svg)")
    command.set_defaults(run=_fit)


def _fit(parsed: argparse.Namespace) -> int:
    (target,) = choose_targets([parsed.function]).targets
    result = fit(
        target.reference() or target.functions[0],
        ExpansionConfig(parsed.basis, parsed.degree, clamp=parsed.clamp, tied=parsed.tied),
        weight=parsed.weight,
        interval=parsed.interval and tuple(parsed.interval),
        derivative_weight=parsed.derivative_weight,
        mean=parsed.mean,
        std=parsed.std,
    )
    print(result)
    if parsed.plot:
        result.plot(parsed.plot)
        print(f"drawn in {parsed.plot}")
    return 0


def _add_bench(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser(
        "bench",
        help="measure activations beside GELU",
        description="Measures time, peak memory and number of kernels of activations beside F.gelu, a plain copy of "
        "the tensor, a rational function and, where it is installed, torchortho: in one process and in turns, so that "
        'ratios hold on a busy machine too. "of the floor" is how close an activation comes to the speed of memory.',
        epilog="examples: ortho-fx bench; ortho-fx bench --bases hermite --degrees 3 8 --dtype bfloat16; "
        "ortho-fx bench --what gpt2 --size 124m --device cuda --dtype bfloat16 --json gpt2.json",
        allow_abbrev=False,
    )
    command.add_argument("--what", default="activation", help="activation (default), mlp, gpt2 or convnext")
    command.add_argument("--bases", nargs="+", metavar="BASIS", help=f"{', '.join(BASES)} (default all)")
    command.add_argument(
        "--degrees", nargs="+", type=int, metavar="DEGREE", help="degrees of each basis (default: a selection)"
    )
    command.add_argument("--granularity", default="layer", help="layer (default), channel or group:N")
    command.add_argument("--tied", action="store_true", help=_TIED)
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    command.add_argument(
        "--elements", type=int, default=4096 * 3072, help="size of the activation's input (default 4096 x 3072)"
    )
    command.add_argument("--size", default="tiny", help="preset of gpt2 or convnext (default tiny)")
    command.add_argument("--batch-size", type=int, help="sequences or images a training step")
    command.add_argument("--threads", type=int, help="threads of the CPU (default: all)")
    command.add_argument("--rounds", type=int, help="times that each is measured (default 20, training steps 10)")
    command.add_argument("--eager", action="store_true", help="measure without torch.compile")
    command.add_argument("--fresh", action="store_true", help="allocate outputs anew at each call, as malloc does it")
    command.add_argument("--mode", default="default", help="default, reduce-overhead or max-autotune, on cuda")
    command.add_argument("--no-peers", dest="peers", action="store_false", help="leave out what is not ours, but GELU")
    command.add_argument(
        "--compile-time", action="store_true", help="measure how long twelve blocks take to compile, with cold caches"
    )
    command.add_argument("--json", metavar="FILE", help="write everything that was measured, unrounded")
    command.set_defaults(run=_bench)


def _bench(parsed: argparse.Namespace) -> int:
    # Only this command needs it, and with it the models.
    from ortho_fx.bench import BenchConfig, bench, choose_expansions

    values = {field.name: getattr(parsed, field.name) for field in fields(BenchConfig) if field.name != "expansions"}
    expansions = choose_expansions(parsed.bases, parsed.degrees, parsed.granularity, parsed.tied)
    config = BenchConfig(expansions=expansions, **values)
    try:
        # Before minutes of measuring, not after them.
        file = Path(parsed.json).open("a") if parsed.json else None
    except OSError as error:
        raise OrthoFxError(f"cannot write {parsed.json}: {error.strerror}") from None
    report = bench(config, _status if sys.stderr.isatty() else lambda line: None)
    if sys.stderr.isatty():
        _status("")
    print(report)
    if file is not None:
        with file:
            file.truncate(0)
            file.write(json.dumps(report.to_dict(), indent=1) + "\n")
        print(f"written to {parsed.json}")
    return 0


def _status(line: str) -> None:
    """Shows a line in the place of the one before."""
    print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _add_train(commands: argparse._SubParsersAction[_Parser]) -> None:
    train = commands.add_parser(
        "train",
        help="train GPT-2 or ConvNeXt with learnable activations",
        description="Trains a model on data that needs no download: GPT-2 on the source text of Python's standard "
        "library, ConvNeXt on scikit-learn's digits. Writes checkpoint.pt and metrics.jsonl.",
        epilog="example: ortho-fx train gpt2 --basis hermite --degree 3",
        allow_abbrev=False,
    )
    train.add_argument("model", help="gpt2 or convnext")
    train.add_argument("--size", default="tiny", help="preset of the model: tiny (default) or a published size")
    train.add_argument("--basis", default="hermite", help=f"{', '.join(BASES)}, or none for the untouched model")
    train.add_argument("--degree", type=int, help="degree of the expansions (default: that of the basis)")
    train.add_argument("--init", default="stable", help=f"start of the expansions: {', '.join(INITS)}")
    train.add_argument("--granularity", default="layer", help="layer (default), channel or group:N")
    train.add_argument("--clamp", type=float, help="cut inputs off so many standard deviations from their mean")
    train.add_argument("--tied", action="store_true", help=_TIED)
    train.add_argument(
        "--no-calibrate",
        dest="calibrate",
        action="store_false",
        help="start for inputs N(0, 1), not for the model's own",
    )
    train.add_argument("--steps", type=int, help="optimizer steps")
    train.add_argument("--batch-size", type=int, help="sequences or images a step")
    train.add_argument("--lr", type=float, help="peak learning rate")
    train.add_argument("--expansion-lr", type=float, help="peak learning rate of the expansions (default: --lr)")
    train.add_argument("--weight-decay", type=float, default=0.1, help="decay of weight matrices (default 0.1)")
    train.add_argument("--warmup", type=int, default=30, help="steps of linear warm-up (default 30)")
    train.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (default 1)")
    train.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default 0)")
    train.add_argument("--eval-every", type=int, default=100, help="steps between validations (default 100)")
    train.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default 500)")
    train.add_argument("--out", help="directory of the run (default: runs/MODEL-SIZE-BASISDEGREE)")
    train.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    train.add_argument("--no-compile", dest="compile", action="store_false", help="run without torch.compile")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="start anew where the run has a checkpoint")
    train.add_argument(
        "--beside-gelu", action="store_true", help="train the untouched model as well, and print both losses"
    )
    train.set_defaults(run=_train)


def _train(parsed: argparse.Namespace) -> int:
    # The trainer's imports take longer than parsing, and a wrong option should be answered at once.
    from ortho_fx.models.training import TrainConfig, train

    config = TrainConfig(**{field.name: getattr(parsed, field.name) for field in fields(TrainConfig)})
    configs = [config]
    if parsed.beside_gelu and config.expansion is not None:
        out = f"{parsed.out}-gelu" if parsed.out else None
        configs.append(replace(config, basis="none", degree=None, out=out))
    results: list[Result] = []
    for config in configs:
        name = config.expansion or "gelu"
        print(f"{config.model} {config.size} with {name}, {config.steps} steps, in {config.directory}", flush=True)
        # An interrupt may have come before the run beside it began.
        resume = parsed.resume and (config is configs[0] or (config.directory / "checkpoint.pt").exists())
        result = train(config, resume=resume, overwrite=parsed.overwrite)
        print(f"{result.parameters:,} parameters, {result.expansion_parameters:,} of them in expansions")
        results.append(result)
    if len(results) > 1:
        print(_side_by_side(results))
    return 0


def _side_by_side(results: Sequence[Result]) -> str:
    """Training loss at the first step and at each validation, and the last validation, a column a run."""
    names = [str(result.config.expansion or "gelu") for result in results]
    shown = [1, *(step for step in results[0].validations if step > 1)]
    rows = [("step", *(f"{name} loss" for name in names))]
    rows += [(str(step), *(f"{result.losses[step]:.4f}" for result in results)) for step in shown]
    last = [result.validations[max(result.validations)] for result in results]
    for measure in last[0]:
        rows.append((measure.replace("_", " "), *(f"{values[measure]:.4f}" for values in last)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
