"""`ortho-fx train`: trains from a recipe or a model's name. It also defines the settings shared with `compare`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ortho_fx.cli.mistakes import say_or_end
from ortho_fx.cli.parser import Commands, Number, Parser, Whole
from ortho_fx.tables import table

if TYPE_CHECKING:
    from ortho_fx.models.recipe import TrainConfig
    from ortho_fx.models.training.loop import Result

# These settings belong to one basis; they mean nothing for another.
_OF_THE_BASIS = ("degree", "init", "granularity", "clamp", "tied")


def add(commands: Commands[Parser]) -> None:
    from ortho_fx.models.recipe import recipes

    command = commands.add_parser(
        "train",
        help="train GPT-2 or ConvNeXt with learnable activations",
        description="Trains a model and writes its directory: checkpoints, weights, metrics and what every activation "
        "became. The data that comes without a download is the source of Python's standard library for gpt2 and "
        "scikit-learn's digits for convnext.",
        epilog=f"recipes: {', '.join(recipes())}. examples: ortho-fx train gpt2 --basis hermite --degree 3; ortho-fx "
        "train convnext --size small --data /usr/share/datasets/fashion-mnist; torchrun --nproc-per-node 8 -m "
        "ortho_fx.cli train gpt2-124m-openwebtext --data openwebtext --device cuda",
        allow_abbrev=False,
    )
    add_settings(command)
    existing = command.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="start anew where the run has a checkpoint")
    command.add_argument(
        "--beside-gelu", action="store_true", help="train the untouched model as well, and print both losses"
    )
    command.set_defaults(run=run, trains=True)


def add_settings(command: argparse.ArgumentParser, *, without: Sequence[str] = (), also: str = "") -> None:
    """Adds the positional RECIPE, which may `also` be something else, and an option for every setting of a run."""
    from ortho_fx.models.recipe import TASKS, TrainConfig

    forms = f"{', '.join(TASKS)}, the name of a recipe, or a TOML file{also}"
    command.add_argument("recipe", metavar="RECIPE", help=forms)
    types: dict[object, Callable[[str], Any]] = {int: Whole(0), float: Number(infinite=True)}
    for setting in TrainConfig.settings():
        if setting.name in {"model", *without}:
            continue
        kind, text = setting.metadata["type"], setting.metadata["help"]
        if setting.default is not None and kind is not bool and "default" not in text:
            text += f" (default {setting.default})"
        flag = "--" + setting.name.replace("_", "-")
        if kind is bool:
            command.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            command.add_argument(flag, type=types.get(kind, kind), default=argparse.SUPPRESS, help=text)


def config_of(parsed: argparse.Namespace, custom: bool = False) -> TrainConfig:
    """The config of the recipe, with the options of the command line in place of its values.

    With `custom`, the recipe may be a FILE.py:FACTORY, see `ortho_fx.models.custom`.
    """
    from ortho_fx.models.custom import is_custom
    from ortho_fx.models.recipe import TASKS, TrainConfig, load_recipe

    named = parsed.recipe in TASKS or (custom and is_custom(parsed.recipe))
    values = {"model": parsed.recipe} if named else load_recipe(parsed.recipe)
    given: dict[str, Any] = {s.name: getattr(parsed, s.name) for s in TrainConfig.settings() if hasattr(parsed, s.name)}
    if given.get("basis", values.get("basis")) != values.get("basis"):
        values = {name: value for name, value in values.items() if name not in _OF_THE_BASIS}
    return TrainConfig.from_values({**values, **given})


def run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed)
    # Imported here, because these imports are slow, and a wrong option should be reported at once.
    from ortho_fx.models.training.checkpoint import checkpoints
    from ortho_fx.models.training.loop import train

    configs = [config]
    if parsed.beside_gelu and config.expansion is not None:
        out = f"{config.out}-gelu" if config.out else None
        configs.append(replace(config, basis="none", degree=None, tied=False, freeze=False, out=out))
    leads = os.environ.get("RANK", "0") == "0"
    results: list[Result] = []
    for config in configs:
        # When the second of two runs ends early, the first is complete, so --resume works without a checkpoint.
        to_go_on = None if config is configs[0] else "go on with --resume"
        if leads:
            of = f"from {config.start_from}" if config.start_from else config.size
            begins = f"{config.model} {of} with {config.activation}, {config.steps} steps, in {config.directory}"
            say_or_end(begins, f"nothing in {config.directory} was changed: {to_go_on or 'run the command again'}")
        # The earlier command may have been interrupted before this run started.
        resume = parsed.resume and (config is configs[0] or bool(checkpoints(config.directory / "checkpoints")))
        result = train(config, resume=resume, overwrite=parsed.overwrite, to_go_on=to_go_on)
        if leads:
            sizes = f"{result.parameters:,} parameters, {result.expansion_parameters:,} of them in expansions"
            say_or_end(
                sizes, f"{config.directory} is complete{'' if config is configs[-1] else ': go on with --resume'}"
            )
        results.append(result)
    if leads and len(results) > 1:
        say_or_end(_side_by_side(results), f"{configs[0].directory} and {configs[1].directory} are complete")
    return 0


def _side_by_side(results: Sequence[Result]) -> str:
    """A table with a column per run: training loss at the first step and each validation, and the last validation."""
    names = [result.config.activation for result in results]
    shown = [1, *(step for step in results[0].validations if step > 1)]
    rows = [("step", *(f"{name} loss" for name in names))]
    rows += [(str(step), *(f"{result.losses[step]:.4f}" for result in results)) for step in shown]
    last = [result.validations[max(result.validations)] for result in results]
    for measure in last[0]:
        rows.append((measure.replace("_", " "), *(f"{values[measure]:.4f}" for values in last)))
    return table(rows, "r")
