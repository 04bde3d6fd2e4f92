"""Modules of PyTorch that compute an activation inside a fused layer: they are listed, and left as they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ortho_fx.passes.modules.exchange import module_in
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.vocabulary.activates import scripted_in
from ortho_fx.passes.vocabulary.sites import Site, join
from ortho_fx.passes.vocabulary.targets import EVERY_TARGET


def fused(prefix: str, owner: nn.Module) -> Iterator[Occurrence]:
    """The activation that a fused layer computes: of recurrent layers, and of layers for quantized training."""
    function = None
    if isinstance(owner, nn.RNN | nn.RNNCell):
        function = owner.nonlinearity
    elif type(owner).__module__.startswith("torch.ao.nn.intrinsic") and "ReLU" in type(owner).__name__:
        # Before they are prepared for training, these are containers that hold the activation as a child.
        held = any(type(child) in EVERY_TARGET.modules for child in owner.children())
        function = None if held else "relu"
    if function is not None:
        reason = f"{type(owner).__name__} computes it inside, in one operation with the rest of the layer"
        yield Occurrence(Site(join(prefix, function), "fused", function, reason=reason), owner, module_in(()))


def scripted(prefix: str, owner: torch.jit.ScriptModule) -> Iterator[Occurrence]:
    """The activations of scripted code, its children's included."""
    try:
        code = owner.inlined_graph
    except Exception:  # a container has no forward
        return
    numbers: dict[str, int] = {}
    for function in scripted_in(code):
        number = numbers[function] = numbers.get(function, -1) + 1
        name = join(prefix, f"{function}_{number}" if number else function)
        site = Site(name, "scripted", function, reason="scripted code cannot be rewritten")
        yield Occurrence(site, owner, module_in(()))
