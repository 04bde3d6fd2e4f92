"""The parts that the parsers of all commands share."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from typing import NoReturn

from ortho_fx.errors import OrthoFxError

Commands = argparse._SubParsersAction


def tied_help() -> str:
    """The `--help` text of --tied, which names the bases that support it."""
    from ortho_fx.config import what_ties  # not above, because completions are answered without PyTorch

    return f"make the {what_ties()} multiples of one that learns"


# No larger seed fits NumPy's, PyTorch's and those that are counted up from it.
LARGEST_SEED = 2**63 - 1
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")
_NUMBER = re.compile(r"[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|nan)", re.IGNORECASE)


@dataclass(frozen=True)
class Whole:
    """The type of an option: a whole number in ASCII digits, from `low` to `high`."""

    low: int
    high: int = LARGEST_SEED

    def __call__(self, text: str) -> int:
        value = int(text) if _WHOLE.fullmatch(text) else None
        if value is None or not self.low <= value <= self.high:
            limits = f"from {self.low} {'up' if self.high == LARGEST_SEED else f'to {self.high}'}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}; got {shown(text)}")
        return value


@dataclass(frozen=True)
class Number:
    """The type of an option: a number in ASCII digits from `low` up, not infinite unless `infinite`, and never NaN."""

    low: float = -math.inf
    infinite: bool = False

    def __call__(self, text: str) -> float:
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        # Python reads 1e309 as infinity.
        infinity = math.isinf(value) and not (self.infinite and "inf" in text.lower())
        if math.isnan(value) or infinity or value < self.low:
            kind = "a number" if self.infinite else "a finite number"
            least = "" if self.low == -math.inf else f", {self.low:g} or more"
            raise argparse.ArgumentTypeError(f"must be {kind}{least}; got {shown(text)}")
        return value


def shown(text: str) -> str:
    """A value in quotes, shortened."""
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-10:]}")


class Parser(argparse.ArgumentParser):
    """A parser that prints a mistake as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise OrthoFxError(message)
