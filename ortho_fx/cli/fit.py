"""`ortho-fx fit`: fits an expansion to a known activation."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from ortho_fx.activations.fit import fit
from ortho_fx.bases import BASES
from ortho_fx.cli.mistakes import say
from ortho_fx.cli.parser import Commands, Number, Parser, Whole, tied_help
from ortho_fx.config import ExpansionConfig, default_basis
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.vocabulary.targets import BY_NAME, Target, choose_targets


def add(commands: Commands[Parser]) -> None:
    command = commands.add_parser(
        "fit",
        help="fit an expansion to a known activation",
        description="Fits an expansion to an activation function in value and derivative, and prints its parameters "
        "and how far the two are apart.",
        epilog="examples: ortho-fx fit gelu --basis hermite --degree 8 --plot gelu.png; "
        "ortho-fx fit relu --basis fourier --weight uniform --interval -5 5",
        allow_abbrev=False,
    )
    command.add_argument("function", help=f"what is fitted: {', '.join(fitted())}")
    command.add_argument("--basis", help=f"{', '.join(BASES)} (default: {default_basis()})")
    command.add_argument("--degree", type=Whole(1), help="degree of the expansion (default: that of the basis)")
    command.add_argument("--clamp", type=Number(), help="cut inputs off so many standard deviations from the mean")
    command.add_argument("--tied", action="store_true", help=tied_help())
    command.add_argument("--weight", default="gaussian", help="gaussian (default), or uniform on the interval")
    command.add_argument("--interval", type=Number(), nargs=2, metavar=("LOW", "HIGH"), help="range of x")
    command.add_argument("--mean", type=Number(), default=0.0, help="mean of the gaussian weight (default 0)")
    command.add_argument(
        "--std", type=Number(), default=1.0, help="standard deviation of the gaussian weight (default 1)"
    )
    command.add_argument(
        "--derivative-weight", type=Number(), default=0.0, help="weight of the derivative's error beside the value's"
    )
    command.add_argument("--plot", metavar="FILE", help="draw the fit (png, pdf, svg)")
    command.set_defaults(run=run)


def fitted() -> dict[str, Callable[[Tensor], Tensor]]:
    """The activations that are functions of their input alone, by name."""
    found = {name: target.reference() or target.functions[0] for name, target in BY_NAME.items()}
    return {name: function for name, function in found.items() if _takes_one(BY_NAME[name])}


def _takes_one(target: Target) -> bool:
    try:
        return target.functions[0](torch.zeros(1)).shape == (1,)
    except TypeError:  # a further argument, such as prelu's weight, is missing
        return False


def run(parsed: argparse.Namespace) -> int:
    choose_targets([parsed.function])  # raises for a name that is not known
    functions = fitted()
    if parsed.function not in functions:
        raise OrthoFxError(
            f"{parsed.function} has parameters besides its input, so it is no one function to fit; fitted are "
            f"{', '.join(functions)}"
        )
    result = fit(
        functions[parsed.function],
        ExpansionConfig(parsed.basis, parsed.degree, clamp=parsed.clamp, tied=parsed.tied),
        weight=parsed.weight,
        interval=parsed.interval and tuple(parsed.interval),
        derivative_weight=parsed.derivative_weight,
        mean=parsed.mean,
        std=parsed.std,
    )
    say(result)
    if parsed.plot:
        result.plot(parsed.plot)
        say(f"drawn in {parsed.plot}")
    return 0
