"""`ortho-fx doctor`: shows how torch.compile compiles expansions on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ortho_fx.cli.parser import Commands, Parser
from ortho_fx.doctor import compile_support


def add(commands: Commands[Parser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="show what torch.compile can do here",
        description="Shows releases, C++ compiler, Triton and GPU, which expansions torch.compile lowers to fused "
        "kernels here, and which it compiles through plain tensor operations, with the reason.",
        epilog="examples: ortho-fx doctor; ortho-fx doctor --check --json",
        allow_abbrev=False,
    )
    command.add_argument(
        "--check", action="store_true", help="compile small expansions now, and compare them (about a minute)"
    )
    command.add_argument("--json", action="store_true", help="print a JSON object")
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    support = compile_support(check=parsed.check)
    print(json.dumps(asdict(support), indent=1) if parsed.json else support)
    return 0
