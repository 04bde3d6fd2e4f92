"""How values get into the parameters of an expansion: into the original ones, whatever computes from them.

What `getattr` returns may be a passing thing: the result of a parametrization or of pruning, or what `fully_shard` has
gathered for a forward pass. A value that is written there is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.moments import Values
from ortho_fx.sharded import copy_whole_, whole


def write(module: nn.Module, values: Values) -> None:
    """Copies arrays by name into the parameters and buffers of every group.

    Raises:
        OrthoFxError: a parametrization that cannot be inverted, or a parameter that is none any more.
    """
    _shard(module)
    with torch.no_grad():
        for name, value in values.items():
            start = torch.from_numpy(np.asarray(value))
            if parametrize.is_parametrized(module, name):
                _write_through(module, name, start)
            elif name in module._parameters or name in module._buffers:
                target = getattr(module, name)
                copy_whole_(target, _for_groups(start, target))
            elif f"{name}_orig" in module._parameters:  # torch.nn.utils.prune computes it in a hook
                target = module.get_parameter(f"{name}_orig")
                copy_whole_(target, _for_groups(start, target))
                setattr(module, name, target * module.get_buffer(f"{name}_mask"))
            else:
                raise OrthoFxError(f"{name} is computed from other parameters: remove what computes it first")


@contextmanager
def unchanged_on_failure(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts the parameters and buffers back if writing to them raises."""
    kept = []
    for module in modules:
        _shard(module)
        for tensors in (module.parameters(), module.buffers()):
            kept += [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except OrthoFxError:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        raise


def _shard(module: nn.Module) -> None:
    # The root that fully_shard wraps keeps its parameters gathered after a forward pass. A state dict holds the
    # original ones, and whoever asks for it has them put back.
    if any(one._state_dict_pre_hooks for one in module.modules()):
        module.state_dict(keep_vars=True)


def _for_groups(start: Tensor, target: Tensor) -> Tensor:
    return start.unsqueeze(1).expand(target.shape) if target.dim() > start.dim() else start


def _write_through(module: nn.Module, name: str, start: Tensor) -> None:
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    shown = getattr(module, name)
    wanted = _for_groups(start, shown).to(shown.device, shown.dtype)
    before = [original.detach().clone() for original in chain.parameters(recurse=False)]
    try:
        _invert(chain, wanted)
        tolerance = 64 * torch.finfo(wanted.dtype).eps
        error = (whole(getattr(module, name)) - wanted).abs().max()
        inexact = not error <= tolerance * wanted.abs().max()
    except Exception as failure:  # what a right_inverse raises, or the lack of one
        inexact, cause = True, f": {failure}"
    else:
        cause = ""
    if inexact:
        for original, value in zip(chain.parameters(recurse=False), before, strict=True):
            original.copy_(value)
        names = ", ".join(type(parametrization).__name__ for parametrization in chain)
        raise OrthoFxError(f"{name} is parametrized by {names}, which no right_inverse gives these values{cause}")


def _invert(chain: Any, wanted: Tensor) -> None:
    """Sets the original parameters of a chain of parametrizations so that it gives what is wanted."""
    inverse: Tensor | Sequence[Tensor] = wanted
    for parametrization in reversed(chain):
        inverse = parametrization.right_inverse(inverse)
    if isinstance(inverse, Tensor):
        copy_whole_(chain.original, inverse)
        return
    for number, part in enumerate(inverse):
        copy_whole_(getattr(chain, f"original{number}"), part)
