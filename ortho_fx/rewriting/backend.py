"""`torch.compile(model, backend="ortho_fx")`: replaces activations by expansions in the first call, and lowers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from ortho_fx import torch_private
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.graph.matches import find_matches
from ortho_fx.passes.vocabulary.targets import choose_targets


def ortho_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of `torch.compile(model, backend="ortho_fx", mode=..., options=...)`.

    Args:
        gm: Dynamo's graph.
        example_inputs: the inputs of the graph.
        mode: Inductor's mode ("reduce-overhead", "max-autotune" ...).
        options: fields of `ExpansionConfig` ("basis", "degree", "init" ...), "disable" with the names of passes to
            leave out, and Inductor's own options.

    Raises:
        OrthoFxError: an unknown option, a wrong value, an optimizer, DDP or FSDP wrapper that was made before the first
            call added the parameters, or no C++ compiler where one is needed.
    """
    try:
        from ortho_fx.rewriting import hook
    except torch_private.MissingNames as missing:
        return _without_frames(missing, gm, example_inputs)
    return hook.compile_graph(gm, example_inputs, mode=mode, options=options)


def _without_frames(
    missing: torch_private.MissingNames, gm: fx.GraphModule, example_inputs: Sequence[Tensor]
) -> Callable[..., Any]:
    """Compiles the graph of a rewritten model, on a release whose frames cannot be read; refuses any other graph."""
    table = choose_targets(None)
    for graph_module in gm.modules():
        if isinstance(graph_module, fx.GraphModule):
            if any(match.function in table.names for match in find_matches(graph_module.graph)):
                raise OrthoFxError(
                    f"{missing}: the backend cannot replace activations here; call ortho_fx.rewrite_(model, config) "
                    "before torch.compile(model)"
                )
    torch_private.report_loss(str(missing), torch_private.HOOK)
    return torch_private.load(torch_private.INDUCTOR_BACKEND).lookup_backend("inductor")(gm, example_inputs)
