"""`watching`: sees every call of some modules, those of `module.forward(x)` included, which no hook sees."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Seen = Callable[[str, Tensor, Tensor], None]


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module], see: Seen) -> Iterator[None]:
    """Calls `see(name, input, output)` after each call of one of the modules, which are given by their names.

    Compiled models run eagerly meanwhile: their code was made without this.
    """
    # To import the compiler for nothing would take a second.
    compiled = "torch._dynamo" in sys.modules
    eager: Any = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    own = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            # Past nn.Module's __setattr__, which a class may override.
            vars(module)["forward"] = functools.partial(_call, name, module.forward, see)
        with eager:
            yield
    finally:
        for name, module in modules.items():
            if own[name] is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own[name]


def _call(name: str, forward: Callable[..., Tensor], see: Seen, *arguments: Any, **named: Any) -> Tensor:
    output = forward(*arguments, **named)
    x = next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
    see(name, x, output)
    return output
