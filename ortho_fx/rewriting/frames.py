"""Reads the frame that Dynamo compiles: the modules that it runs, and the activations that its own code calls.

A frame is a call of a function: a model's `forward`, a training step, or the rest of one after a graph break, which
Dynamo runs as a separate function. Modules are found by Dynamo's paths, such as `L['nets']['d'].blocks.0`. All names of
PyTorch used here are private; they come from `torch_private.HOOK`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import fx, nn

from ortho_fx import torch_private
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.passes.graph.matches import Match
from ortho_fx.passes.source import Call, find_calls, source_of

_dynamo = torch_private.load(torch_private.HOOK)
# Dynamo's translator of a frame.
Frame = Any
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_\d+")
_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<key>'(?:[^'\\]|\\.)*'|-?\d+)\]")


def current_frame() -> Frame:
    """The translator of the frame that is being compiled; it holds the frame's variables."""
    translator = _dynamo.InstructionTranslator.current_tx()
    return translator.output.root_tx or translator


def own_module(frame: Frame) -> nn.Module | None:
    """The module whose method the frame runs, or resumes after a graph break; None for any other function."""
    code: types.CodeType = frame.f_code
    resumed = _RESUMED.fullmatch(code.co_name)
    if resumed:
        modules = [value for value in frame.f_locals.values() if isinstance(value, nn.Module)]
        return next((module for module in modules if _has_method(module, resumed[1], code)), None)
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    # Dynamo compiles PyTorch's own modules through one of its functions, which closes over the module, or over a
    # method of it, as for `model.compile()` and `torch.compile(model.forward)`.
    called = frame.f_locals.get("fn") if code.co_filename == _dynamo.external_utils.__file__ else None
    while isinstance(called, functools.partial):
        called = called.func
    called = called.__self__ if inspect.ismethod(called) else called
    return next((module for module in (first, called) if isinstance(module, nn.Module)), None)


def _has_method(module: nn.Module, name: str, code: types.CodeType) -> bool:
    for cls in type(module).__mro__:
        function = inspect.unwrap(vars(cls).get(name, None))
        if isinstance(function, types.FunctionType) and _same_place(function.__code__, code):
            return True
    return False


def _same_place(one: types.CodeType, other: types.CodeType) -> bool:
    """Whether `other` is code of the function of `one`; after a graph break it starts at a later line."""
    last = max((line for _, _, line in one.co_lines() if line is not None), default=one.co_firstlineno)
    return one.co_filename == other.co_filename and one.co_firstlineno <= other.co_firstlineno <= last


def roots(frame: Frame, nodes: Iterable[fx.Node]) -> list[nn.Module]:
    """The outermost modules that the frame runs: the module whose method it is, and the modules that it calls."""
    own = own_module(frame)
    found = {} if own is None else {id(own): own}
    for node in nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            path, cls = next(iter(stack.values()))
            module = _resolve(path, frame)
            if isinstance(module, cls):
                found[id(module)] = module
    inside = {id(child) for root in found.values() for child in root.modules() if child is not root}
    return [root for key, root in found.items() if key not in inside]


def _resolve(path: str, frame: Frame) -> Any:
    """The object at one of Dynamo's paths (`L['nets']['d'].blocks.0`) in the frame; None if there is none."""
    start = re.match(r"([LG])\['(\w+)'\]", path)
    if start is None:
        return None
    value: Any = (frame.f_locals if start[1] == "L" else frame.f_globals).get(start[2])
    place = start.end()
    while place < len(path):
        step = _STEP.match(path, place)
        if step is None:
            return None
        try:
            value = _child(value, step["name"]) if step["name"] else value[ast.literal_eval(step["key"])]
        except (AttributeError, LookupError, TypeError):
            return None
        place = step.end()
    return value


def _child(value: Any, name: str) -> Any:
    children = value._modules if isinstance(value, nn.Module) else {}
    return children[name] if name in children else getattr(value, name)


def own_calls(frame: Frame, matches: Sequence[Match]) -> Iterator[tuple[fx.Node, ExpansionActivation]]:
    """The activations in the frame's own old code, or in a function that it calls by name, each with its expansion."""
    own = own_module(frame)
    if own is None:
        return
    source = source_of(own)
    expansions = source.expansions()
    calls_here = [call for call in find_calls(source) if call.attribute in expansions]
    resumed = _RESUMED.fullmatch(frame.f_code.co_name) is not None
    if not any(call.code is frame.f_code or (resumed and _same_place(call.code, frame.f_code)) for call in calls_here):
        return
    places: dict[tuple[str, str, int], list[Call]] = {}
    for call in calls_here:
        places.setdefault((call.function, call.code.co_filename, call.line), []).append(call)
    visits: dict[tuple[str, str, int], int] = {}
    for match in matches:
        # The innermost frame may belong to a module that the call ran, such as nn.GELU().
        stack = [(match.function, *line) for line in source_lines(match.node)]
        place = next((place for place in stack if place in places), None)
        # After a graph break it is not known which of several calls on a line ran before the break.
        if place is None or (resumed and len(places[place]) > 1):
            continue
        # Several calls of a function on one line are in the order in which Python evaluates them; a loop repeats them.
        calls = sorted(places[place], key=lambda call: call.order)
        visit = visits[place] = visits.get(place, -1) + 1
        yield match.node, getattr(own, expansions[calls[visit % len(calls)].attribute])


def source_lines(node: fx.Node) -> list[tuple[str, int]]:
    """File and line of each frame that made the node, the innermost first."""
    frames = re.findall(r'^\s*File "(.+)", line (\d+), in ', node.meta.get("stack_trace") or "", flags=re.MULTILINE)
    return [(file, int(line)) for file, line in reversed(frames)]
