"""`ortho-fx bench`: compares the speed of activations with GELU's."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

from ortho_fx.bases import BASES
from ortho_fx.cli.mistakes import say
from ortho_fx.cli.parser import Commands, Parser, Whole, tied_help
from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file


def add(commands: Commands[Parser]) -> None:
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
        "--degrees", nargs="+", type=Whole(1), metavar="DEGREE", help="degrees of each basis (default: a selection)"
    )
    command.add_argument("--granularity", default="layer", help="layer (default), model, channel or group:N")
    command.add_argument("--tied", action="store_true", help=tied_help())
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    command.add_argument(
        "--elements", type=Whole(1), default=4096 * 3072, help="size of the activation's input (default 4096 x 3072)"
    )
    command.add_argument("--size", default="tiny", help="preset of gpt2 or convnext (default tiny)")
    command.add_argument("--batch-size", type=Whole(1), help="sequences or images a training step")
    command.add_argument("--threads", type=Whole(1, os.cpu_count() or 1), help="threads of the CPU (default: all)")
    command.add_argument("--rounds", type=Whole(1), help="times that each is measured (default 20, training steps 10)")
    command.add_argument("--eager", action="store_true", help="measure without torch.compile")
    command.add_argument("--fresh", action="store_true", help="allocate outputs anew at each call, as malloc does it")
    command.add_argument("--mode", default="default", help="default, reduce-overhead or max-autotune, on cuda")
    command.add_argument("--no-peers", dest="peers", action="store_false", help="leave out what is not ours, but GELU")
    command.add_argument(
        "--compile-time", action="store_true", help="measure how long twelve blocks take to compile, with cold caches"
    )
    command.add_argument("--json", metavar="FILE", help="write everything that was measured, unrounded")
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    # Imported here, because only this command needs these modules, which import the models.
    from ortho_fx.bench.config import BenchConfig
    from ortho_fx.bench.measure import bench, choose_expansions

    values = {field.name: getattr(parsed, field.name) for field in fields(BenchConfig) if field.name != "expansions"}
    expansions = choose_expansions(parsed.bases, parsed.degrees, parsed.granularity, parsed.tied)
    config = BenchConfig(expansions=expansions, **values)
    file = Path(parsed.json) if parsed.json else None
    if file is not None:
        _check_writable(file)  # before minutes of measuring
    report = bench(config, _status if sys.stderr.isatty() else lambda line: None)
    if sys.stderr.isatty():
        _status("")
    try:
        if file is not None:
            _write(file, json.dumps(report.to_dict(), indent=1) + "\n")
    finally:  # what was measured is not lost with the file
        say(report)
    if file is not None:
        say(f"written to {parsed.json}")
    return 0


def _check_writable(path: Path) -> None:
    try:
        there = path.exists()
        with path.open("a"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise OrthoFxError(f"cannot write {path}: {error.strerror}") from None


def _write(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _status(line: str) -> None:
    """Shows a line that overwrites the one before."""
    print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
