"""The parts that the parsers of all commands share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ortho_fx.errors import OrthoFxError

Commands = argparse._SubParsersAction


def tied_help() -> str:
    """The `--help` text of --tied, which names the bases that support it."""
    from ortho_fx.config import what_ties  # not above, because completions are answered without PyTorch

    return f"make the {what_ties()} multiples of one that learns"


class Parser(argparse.ArgumentParser):
    """A parser that prints a mistake as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise OrthoFxError(message)
