"""`ortho-fx sites`: lists the activations of a model, and why some of them would not be rewritten."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from torch import nn

from ortho_fx.cli.mistakes import say
from ortho_fx.cli.models import FORMS, build_model
from ortho_fx.cli.parser import Commands, Parser
from ortho_fx.passes.vocabulary.sites import Site
from ortho_fx.passes.vocabulary.targets import choose_targets
from ortho_fx.rewriting.rewrite import find_sites
from ortho_fx.tables import table


def add(commands: Commands[Parser]) -> None:
    command = commands.add_parser(
        "sites",
        help="list the activations of a model",
        description="Lists every activation of a model as rewrite_ finds it: those that it would replace, and those "
        "that it would leave, with the reason. The model is built without numbers in it, and is not run.",
        epilog="examples: ortho-fx sites gpt2:124m; ortho-fx sites timm:resnet50 --json; ortho-fx sites hf:llama "
        "--targets silu sigmoid; ortho-fx sites my_models.py:make_model",
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", help=FORMS)
    command.add_argument(
        "--targets",
        nargs="+",
        metavar="FUNCTION",
        help="activation functions to replace, such as relu or sigmoid (default: every one that is not a gate)",
    )
    command.add_argument(
        "--sharing",
        default="instance",
        help="one expansion for each instance (default), for each call in source, or for each site",
    )
    command.add_argument("--json", action="store_true", help="print a JSON list, an object for each activation")
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    choose_targets(parsed.targets)  # checked before the model is built, which can be slow
    model = build_model(parsed.model)
    sites = find_sites(model, targets=parsed.targets, sharing=parsed.sharing)
    if parsed.json:
        print(json.dumps([{**asdict(site), "owner": _owner(model, site)} for site in sites], indent=1))
        return 0
    rows = [("name", "kind", "function", "owner", "")]
    for site in sites:
        left = f"left: {site.reason}" if site.reason else ""
        rows.append((", ".join((site.name, *site.aliases)), site.kind, site.function, _owner(model, site), left))
    if sites:
        say(table(rows))
    left_alone = sum(bool(site.reason) for site in sites)
    count = f"{len(sites)} activations" if len(sites) != 1 else "1 activation"
    say(f"{type(model).__name__}: {count}, {len(sites) - left_alone} would be replaced, {left_alone} left")
    return 0


def _owner(model: nn.Module, site: Site) -> str:
    """The class of the module that would hold the expansion."""
    owner = model
    for key in site.name.split(".")[:-1]:
        child = owner._modules.get(key)
        if child is None:  # a dict key, which may contain a dot
            break
        owner = child
    return type(owner).__name__
