"""`Ran`: which activations a model runs, whatever the rewrite says of them.

It sees the calls themselves, as PyTorch's `TorchFunctionMode` hands them over: activations of the table of targets that
are no gates, as functions and as methods of tensors. It does not see formulas, code inside of scripted functions, and
operators that a `torch.autograd.Function` calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ortho_fx.passes import vocabulary
from ortho_fx.passes.vocabulary.sites import Site
from ortho_fx.passes.vocabulary.targets import EVERY_TARGET, Target

_TORCH = str(Path(torch.__file__).parent)
# In a clone the passes lie beside the package.
_OURS = (str(Path(__file__).parents[1]), str(Path(vocabulary.__file__).parents[1]))


@dataclass(frozen=True)
class Place:
    """Where an activation ran.

    Attributes:
        function: its name in the table of targets.
        module: the qualified name of the innermost module of the model that was running.
        lines: file, first and last line of each call between that module and the activation, the innermost first;
            those of PyTorch are left out.
    """

    function: str
    module: str
    lines: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        where = f" at {self.lines[0][0]}:{self.lines[0][1]}" if self.lines else ""
        return f"{self.function} in {self.module or 'the model'}{where}"

    def is_listed(self, sites: Iterable[Site]) -> bool:
        """Whether one of these sites is the activation: by its module, its line, or the attribute that holds it."""
        for site in sites:
            names = (site.name, *site.aliases)
            in_line = any(
                file == name and first <= number <= last
                for name, first, last in self.lines
                for file, number in site.lines
            )
            owned = self.module in [name.rpartition(".")[0] for name in names]
            kept = site.kind in ("attribute", "fused", "scripted") and site.function in (self.function, "activation")
            if self.module in names or (owned and (in_line or kept)):
                return True
        return False


class Ran(TorchFunctionMode):
    """Notes the activations that run while it is entered, in `places`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(module): name for name, module in model.named_modules()}
        self.places: dict[Place, None] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        target = _target(func)
        if target is not None and not target.gate:
            given = next((value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)), None)
            place = self._place(target.name) if given is not None and given.is_floating_point() else None
            if place is not None:
                self.places[place] = None
        return func(*args, **(kwargs or {}))

    def _place(self, function: str) -> Place | None:
        """Where the call comes from; None for one of ortho_fx's own."""
        frame: FrameType | None = sys._getframe(2)
        lines = []
        while frame is not None:
            code = frame.f_code
            owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            module = self._names.get(id(owner)) if isinstance(owner, nn.Module) else None
            if code.co_filename.startswith(_OURS):
                return None
            if not code.co_filename.startswith((_TORCH, "<frozen")):
                lines.append((Path(code.co_filename).name, *_lines(code, frame)))
            if module is not None:
                return Place(function, module, tuple(lines))
            frame = frame.f_back
        return Place(function, "", tuple(lines))


def _target(func: Callable[..., Any]) -> Target | None:
    """The target of a function, or of a method of tensors."""
    method = getattr(func, "__objclass__", None) is not None and issubclass(Tensor, func.__objclass__)  # type: ignore[attr-defined]
    return EVERY_TARGET.methods.get(func.__name__) if method else EVERY_TARGET.of_function(func)


def _lines(code: CodeType, frame: FrameType) -> tuple[int, int]:
    """The first and the last line of the expression that a frame is at."""
    if sys.version_info < (3, 11):
        return frame.f_lineno, frame.f_lineno
    first, last, *_ = list(code.co_positions())[frame.f_lasti // 2]
    return first or frame.f_lineno, last or first or frame.f_lineno
