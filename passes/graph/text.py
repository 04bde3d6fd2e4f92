"""Prints a graph as text that can be compared: one node per line, and names instead of memory addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ortho_fx.passes.vocabulary.expansions import LearnableExpansion
from ortho_fx.passes.vocabulary.sites import NOTE, Site
from ortho_fx.passes.vocabulary.targets import OPERATOR

_MOST_NUMBERS = 8


def graph_text(model: nn.Module) -> str:
    """Every graph of a model as text, with the passes' notes on the nodes, and the expansions' parameters."""
    parts = []
    for name, owner in model.named_modules():
        if not isinstance(owner, fx.GraphModule):
            continue
        lines = [f"graph {name or 'of the model'}:", *(f"  {_line(node)}" for node in owner.graph.nodes)]
        parts.append("\n".join(lines))
    numbers = [
        f"  {name}.{key} = {_numbers(parameter)}"
        for name, module in model.named_modules()
        if isinstance(module, LearnableExpansion)
        for key, parameter in module.named_parameters()
    ]
    if numbers:
        parts.append("\n".join(["parameters of expansions:", *numbers]))
    return "\n\n".join(parts) + "\n"


def _line(node: fx.Node) -> str:
    arguments = ", ".join([*map(_value, node.args), *(f"{key}={_value(value)}" for key, value in node.kwargs.items())])
    if node.op == "placeholder":
        text = f"{node.name} = input" if not node.args else f"{node.name} = input, else {arguments}"
    elif node.op == "get_attr":
        text = f"{node.name} = self.{node.target}"
    elif node.op == "call_module":
        text = f"{node.name} = self.{node.target}({arguments})"
    elif node.op == "call_method":
        receiver, *rest = map(_value, node.args)
        text = f"{node.name} = {receiver}.{node.target}({', '.join(rest)})"
    elif node.op == "output":
        text = f"return {arguments}"
    else:
        text = f"{node.name} = {_function(node.target)}({arguments})"
    note = node.meta.get(NOTE)
    return f"{text}  # {_note(note)}" if isinstance(note, Site) else text


def _note(site: Site) -> str:
    fate = f"left: {site.reason}" if site.reason else site.expansion or "not decided"
    return f"{site.name}: {site.function}, {fate}"


def _function(target: Any) -> str:
    if isinstance(target, OPERATOR):
        return str(target)
    module = (getattr(target, "__module__", None) or "torch").replace("_operator", "operator")
    return f"{module}.{getattr(target, '__name__', type(target).__name__)}"


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple | list):
        items = ", ".join(map(_value, value))
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return ":".join("" if part is None else _value(part) for part in (value.start, value.stop, value.step))
    if isinstance(value, bool | int | float | complex | str | None):
        return repr(value)
    if isinstance(value, torch.dtype | torch.device | torch.memory_format | torch.layout | torch.Size):
        return str(value)
    # The repr of any other object may hold its address.
    return getattr(value, "__qualname__", type(value).__name__)


def _numbers(parameter: Tensor) -> str:
    count = parameter.numel()
    if parameter.is_meta or count > _MOST_NUMBERS:
        return f"{count} numbers of shape {tuple(parameter.shape)}"
    return ", ".join(f"{number:.4g}" for number in parameter.detach().flatten().tolist())
