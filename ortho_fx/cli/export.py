"""`ortho-fx export`: writes our models for others: ONNX, a program of `torch.export`, transformers, timm."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_fx.activations.freeze import freeze_
from ortho_fx.cli.mistakes import say
from ortho_fx.cli.parser import Commands, Parser, Whole
from ortho_fx.errors import OrthoFxError
from ortho_fx.memory import require_memory

if TYPE_CHECKING:
    from ortho_fx.models.data.vocabulary import Vocabulary

ENDINGS = (".onnx", ".pt2")
LIBRARIES = ("transformers", "timm")
_DIGITS, _MNIST, _PHOTOGRAPHS = 8, 28, 224


def add(commands: Commands[Parser]) -> None:
    command = commands.add_parser(
        "export",
        help="write a trained model for ONNX, torch.export, transformers or timm",
        description="Writes the model of a run or a file of weights so that it runs without ortho_fx: as an ONNX file "
        "of standard operators, or as a .pt2 file for torch.export.load. With --to, writes a folder that transformers "
        "or timm loads, where expansions still need ortho_fx. Runs what it wrote beside the model, and says how far "
        "the two are apart.",
        epilog="examples: ortho-fx export runs/gpt2-tiny-hermite3 gpt2.onnx --freeze --dynamic-batch; "
        "ortho-fx export runs/fourier/model.safetensors digits.pt2 --batch-size 64; "
        "ortho-fx export runs/gpt2-tiny-gelu gpt2 --to transformers",
        allow_abbrev=False,
    )
    command.add_argument("weights", metavar="RUN_OR_WEIGHTS", help="directory of a run, or a file of weights")
    command.add_argument("out", metavar="OUT", help="file that is written, in .onnx or .pt2; with --to, a folder")
    command.add_argument(
        "--to", choices=LIBRARIES, help="write a folder for this library: a gpt2 or a convnext of its own"
    )
    command.add_argument("--tokenizer", help="with --to transformers: bytes, or a tokenizer.json (default: the run's)")
    command.add_argument("--freeze", action="store_true", help="make expansions fixed functions at the least cost")
    batch = command.add_mutually_exclusive_group()
    batch.add_argument("--batch-size", type=Whole(1), help="sequences or images that it takes (default 1)")
    batch.add_argument("--dynamic-batch", action="store_true", help="let it take any number of them")
    command.add_argument("--image-size", type=Whole(1), help="side of the images in pixels (default: that of the run)")
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    out = Path(parsed.out)
    _check_options(parsed)
    if parsed.to is not None:
        return _write_folder(parsed)
    if out.suffix not in ENDINGS:
        raise OrthoFxError(f"OUT must end in {' or '.join(ENDINGS)}; got {parsed.out}")
    # Imported here, because these imports are slow, and a wrong option should be reported at once.
    from ortho_fx.export import export_onnx, export_program
    from ortho_fx.models.weights.layouts import load_pretrained

    pretrained = load_pretrained(parsed.weights)
    batch_size = 2 if parsed.dynamic_batch else parsed.batch_size or 1
    inputs = _example_inputs(pretrained.model, batch_size, parsed.image_size, Path(parsed.weights))
    if parsed.freeze:
        say(f"{len(freeze_(pretrained.model).names)} expansions frozen")
    export = export_onnx if out.suffix == ".onnx" else export_program
    exported = export(pretrained.model, inputs, out, dynamic_batch=parsed.dynamic_batch)
    for note in pretrained.notes:  # now, since an error is one line
        say(f"{parsed.weights}: {note}", sys.stderr)
    say(exported)
    return 0


def _check_options(parsed: argparse.Namespace) -> None:
    if parsed.tokenizer is not None and parsed.to != "transformers":
        raise OrthoFxError("--tokenizer goes with --to transformers")
    for name in ("batch_size", "dynamic_batch"):
        if parsed.to is not None and getattr(parsed, name):
            raise OrthoFxError(
                f"--{name.replace('_', '-')} is for files in .onnx and .pt2: {parsed.to} takes any batch"
            )
    if parsed.to == "transformers" and parsed.image_size is not None:
        raise OrthoFxError("--image-size is for images, and --to transformers for a gpt2")


def _write_folder(parsed: argparse.Namespace) -> int:
    from ortho_fx.models.weights.bundle import run_settings
    from ortho_fx.models.weights.foreign import export_timm, export_transformers
    from ortho_fx.models.weights.layouts import load_pretrained

    weights = Path(parsed.weights)
    pretrained = load_pretrained(weights)
    model: Any = pretrained.model
    if parsed.freeze:
        say(f"{len(freeze_(model).names)} expansions frozen")
    if parsed.to == "transformers":
        exported = export_transformers(model, parsed.out, _vocabulary(weights, parsed.tokenizer))
    else:
        channels = getattr(model.config, "channels", 0)
        size = parsed.image_size or _image_size(run_settings(weights), channels)
        exported = export_timm(model, parsed.out, size)
    for note in pretrained.notes:
        say(f"{parsed.weights}: {note}", sys.stderr)
    say(exported)
    return 0


def _vocabulary(weights: Path, tokenizer: str | None) -> Vocabulary | None:
    """What the tokens mean; None where it is not known, and not asked for."""
    from ortho_fx.models.data.vocabulary import vocabulary_of

    try:
        return vocabulary_of(weights, tokenizer)
    except OrthoFxError:
        if tokenizer is not None:
            raise
        return None


def _example_inputs(model: nn.Module, batch_size: int, image_size: int | None, weights: Path) -> Tensor:
    from ortho_fx.models.gpt2 import GPT2
    from ortho_fx.models.weights.bundle import run_settings

    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    if isinstance(model, GPT2):
        if image_size is not None:
            raise OrthoFxError(f"--image-size is for a convnext, and {weights} is a gpt2")
        require_memory(4 * batch_size * config.context * config.vocabulary, f"the outputs of {batch_size} sequences")
        return torch.randint(config.vocabulary, (batch_size, config.context), generator=generator)
    side = image_size or _image_size(run_settings(weights), config.channels)
    # The images, and the first activation that the model makes of them.
    values = config.channels * side**2 + config.widths[0] * (side // config.patch) ** 2
    require_memory(4 * batch_size * values, f"{batch_size} images of {side} x {side} pixels")
    smallest = config.patch * 2 ** (len(config.depths) - 1)
    if side < smallest:
        raise OrthoFxError(f"--image-size must be {smallest} or more for this convnext; got {side}")
    dtype = next(model.parameters()).dtype
    return torch.randn(batch_size, config.channels, side, side, generator=generator).to(dtype)


def _image_size(settings: Mapping[str, Any], channels: int) -> int:
    """The side of a run's images: from its settings, or else from its data."""
    size = settings.get("image_size")
    if size is not None:
        if type(size) is not int or size < 1:
            raise OrthoFxError(f"image_size of the run must be a whole number from 1 up; got {size!r}: --image-size")
        return size
    if settings.get("data") == "digits":
        return _DIGITS
    return _MNIST if channels == 1 else _PHOTOGRAPHS
