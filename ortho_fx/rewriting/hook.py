"""`backend="ortho_fx"`: replaces activations by expansions during the first call, and then lowers them.

Dynamo passes a graph in which every activation is a call. If the graph has activations, the hook finds the model that
the compiled frame runs, calls `rewrite_` on the real modules, and makes Dynamo trace the frame again. The second trace
sees the expansions' parameters as parameters of the model, as if the user had called `rewrite_` first. So the compiled
code captures nothing, the eager model computes the same function as the compiled one, and the state dicts of both ways
agree. The graph then goes to Inductor once.

One frame cannot be traced again: a frame whose own method was rewritten still runs the old code. For this one call its
graph runs without Inductor, with its activations replaced by the new expansions. From the next call on, the new method
runs and is compiled.

New parameters in a first call are too late for an optimizer, DDP or FSDP that already has the model. The hook refuses
those before it changes anything. `frames` reads what Dynamo knows about a frame.
"""

from __future__ import annotations

import gc
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from ortho_fx import torch_private
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.operators.support import in_a_thread
from ortho_fx.passes import pipeline
from ortho_fx.passes.graph.choose import check_needs_no_example
from ortho_fx.passes.graph.matches import Match
from ortho_fx.passes.graph.nodes import node_in
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.targets import choose_targets
from ortho_fx.rewriting import frames
from ortho_fx.rewriting.frames import Frame
from ortho_fx.rewriting.rewrite import find_sites, rewrite_
from ortho_fx.toolchain import NoCompiler, cpp_compiler

_dynamo = torch_private.load(torch_private.HOOK)
_ShortenTraceback: Any = _dynamo.ShortenTraceback
_RestartAnalysis: Any = _dynamo.TensorifyScalarRestartAnalysis
# Classes that average parameters, such as PyTorch's AveragedModel, timm's ModelEma and diffusers' EMAModel.
_AVERAGE = re.compile("[Aa]verag|Ema|EMA|^ema")
# Without one of these nothing is replaced.
_NEEDED = ("find", "choose", "substitute")
_CONFIG_FIELDS = tuple(field.name for field in fields(ExpansionConfig))


class CompileError(_ShortenTraceback, OrthoFxError):
    """An `OrthoFxError` that Dynamo passes on unchanged; it would wrap any other error in its own."""

    def __init__(self, message: str) -> None:
        _ShortenTraceback.__init__(self, message, first_useful_frame=sys._getframe(1))
        self.message = message

    def __str__(self) -> str:
        return self.message  # without the debugging advice that Dynamo appends to `args`


class _Retrace(_RestartAnalysis):
    """Makes Dynamo trace the frame again; it is the only restart that Dynamo accepts from a backend."""


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The implementation of `ortho_fx.rewriting.backend.ortho_fx`, if Dynamo's frames can be read."""
    config, disable, inductor = _read_options(mode, options)
    frame = frames.current_frame()
    roots = frames.roots(frame, gm.graph.nodes)
    # The passes only find the activations in this graph. The edits are made to the modules that own them.
    record = pipeline.run(gm, config, disable=disable, until="choose")
    replaces = disable.isdisjoint(_NEEDED)
    if replaces and _rewrite(roots, config, disable):
        _restart(frame)
    activations = list(_activations(record)) if replaces else []
    own = dict(frames.own_calls(frame, activations))
    left = [_describe(match.node) for match in activations if match.node not in own]
    if left:
        warnings.warn(f"ortho_fx left {', '.join(left)}: {_why_left(frame)}", stacklevel=2)
    if own:
        return _run_once(frame, gm, activations, own)
    if replaces and not activations:
        _warn_of_nothing(roots)
    try:
        return inductor(gm, example_inputs)
    except Exception:
        if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in example_inputs):
            try:
                cpp_compiler()
            except NoCompiler as missing:
                raise CompileError(str(missing)) from None
        raise


def _read_options(
    mode: str | None, options: Mapping[str, Any] | None
) -> tuple[ExpansionConfig, frozenset[str], Callable[..., Callable[..., Any]]]:
    """The expansion, the passes to leave out, and Inductor with its own mode and options."""
    rest = dict(options or {})
    mine = {key: rest.pop(key) for key in _CONFIG_FIELDS if key in rest}
    disable = rest.pop("disable", ())
    known = _dynamo.config.get_config_copy()
    unknown = [key for key in rest if key.replace("-", "_") not in known]
    if unknown:
        raise CompileError(
            f"unknown option {', '.join(map(repr, unknown))}; options are {', '.join(_CONFIG_FIELDS)} "
            "and those of torch._inductor.config, and disable"
        )
    try:
        config = ExpansionConfig(**mine)
        check_needs_no_example(config)
        if config.granularity == "model":
            raise OrthoFxError(
                "granularity 'model' shares one expansion over a whole model, and what is compiled may be a part of "
                "it: call rewrite_(model, config) before torch.compile"
            )
        disabled = frozenset(pipeline.disabled_passes(disable))
        return config, disabled, _dynamo._TorchCompileInductorWrapper(mode, rest, None)
    except (OrthoFxError, RuntimeError) as error:
        raise CompileError(str(error)) from None


def _activations(record: pipeline.Record) -> Iterator[Match]:
    """The activations that are nodes of the graph, or of graphs inside it such as checkpointed regions."""
    names = choose_targets(None).names
    for occurrence in record.occurrences:
        if occurrence.match is not None and occurrence.match.function in names:
            yield occurrence.match


def _why_left(frame: Frame) -> str:
    """Why an activation of the frame has no owner: it is the compiled module itself, or no module calls it."""
    own = frames.own_module(frame)
    sites = [] if own is None else find_sites(own)
    return next((site.reason for site in sites if not site.name), "no module's own code calls it")


def _warn_of_nothing(roots: Sequence[nn.Module]) -> None:
    """Warns of compiled models that neither have an activation nor ever had one replaced."""
    if roots and not any(isinstance(module, Expansion) for root in roots for module in root.modules()):
        names = ", ".join(dict.fromkeys(type(root).__name__ for root in roots))
        warnings.warn(f"ortho_fx found no activation to replace in {names}", stacklevel=3)


def _restart(frame: Frame) -> NoReturn:
    # The log replays decisions for the instructions of the last trace, but the modules now run other instructions.
    frame.speculation_log.clear()
    raise _Retrace(restart_reason="ortho_fx replaced the activations of the traced modules")


def _rewrite(roots: Sequence[nn.Module], config: ExpansionConfig, disable: Iterable[str]) -> bool:
    """Replaces the activations of these models; returns whether there were any."""
    pending = [root for root in roots if any(not site.reason for site in find_sites(root))]
    for root in pending:
        _refuse_late_parameters(root)
    # The parameters outlive this trace, so no mode of the first call may affect them: a new thread has no modes.
    for root in pending:
        in_a_thread(partial(rewrite_, root, config, disable=disable))
    return bool(pending)


def _refuse_late_parameters(model: nn.Module) -> None:
    """Raises if an object has already collected the model's parameters, and would miss the new ones."""
    parameters = {id(parameter) for parameter in model.parameters()}
    modules = {id(module) for module in model.modules()}
    advice = f"call ortho_fx.rewrite_(model, config) on the {type(model).__name__} before making it"
    gc.collect()  # an optimizer that is garbage does not matter
    for found in gc.get_objects():
        if issubclass(type(found), torch.optim.Optimizer):
            if any(id(parameter) in parameters for group in found.param_groups for parameter in group["params"]):
                raise CompileError(f"the optimizer {type(found).__name__} would miss the new parameters: {advice}")
        elif issubclass(type(found), DistributedDataParallel) and any(id(m) in modules for m in found.modules()):
            raise CompileError(f"DistributedDataParallel would miss the new parameters: {advice}")
        elif _AVERAGE.search(type(found).__name__) and _averages(found, model):
            raise CompileError(f"the average {type(found).__name__} would miss the new parameters: {advice}")
    for module in model.modules():
        if any(cls.__module__.startswith("torch.distributed.") for cls in type(module).__mro__):
            raise CompileError(f"{type(module).__mro__[0].__name__} would miss the new parameters: {advice}")


def _averages(found: object, model: nn.Module) -> bool:
    """Whether an object holds a copy of the model, or of its parameters."""
    shapes = [parameter.shape for parameter in model.parameters()]
    held = getattr(found, "__dict__", {})
    for value in [*held.values(), *held.get("_modules", {}).values()]:
        if isinstance(value, nn.Module):
            if type(value) is type(model) and [parameter.shape for parameter in value.parameters()] == shapes:
                return True
        elif isinstance(value, list) and value and [getattr(item, "shape", None) for item in value] == shapes:
            return True
    return False


def _run_once(
    frame: Frame,
    gm: fx.GraphModule,
    matches: Sequence[Match],
    own: Mapping[fx.Node, ExpansionActivation],
) -> Callable[..., Any]:
    """The graph with these activations replaced, for the current call only."""
    copied: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, copied))
    runner = fx.GraphModule(gm, graph)
    for number, match in enumerate(match for match in matches if match.node in own):
        assert match.argument is not None
        inside = replace(
            match,
            node=copied[match.node],
            argument=copied[match.argument],
            nodes=tuple(copied[node] for node in match.nodes),
        )
        node_in(runner, inside, f"expansion_{number}")(own[match.node])
    code = frame.f_code

    def run(*args: Any) -> Any:
        # The compiled entries of the old code are useless now. They would count against Dynamo's recompile limit if
        # each block of a model is compiled separately.
        _dynamo.reset_code(code)
        return runner(*args)

    return run


def _describe(node: fx.Node) -> str:
    file, line = next(iter(frames.source_lines(node)), ("", 0))
    return f"{node.name} at {file}:{line}" if file else node.name
