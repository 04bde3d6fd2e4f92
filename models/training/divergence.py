"""`explain_divergence`: where a loss or gradient stopped being finite, and what to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ortho_fx import trees
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.models.training.monitor import expansions, first_rows, plain_name, probing, reach

# Inputs have left their range when their standard deviation is more than _GROWN times the first one. Parameters have
# moved too far when their drift is more than _DRIFTED.
_GROWN, _DRIFTED = 10.0, 0.5
_SKIP = "skip_bad_steps"
_FINITE = "all modules' outputs are finite: "
_SLOWER = ["a lower lr", "a longer warmup", "a smaller clip", _SKIP]


def explain_divergence(
    model: nn.Module,
    forward: Callable[[], object],
    rows_so_far: Sequence[Mapping[str, Any]],
    what: str,
    step: int,
) -> str:
    """One line that names the module where a loss or gradient stopped being finite, and settings that may help.

    It names the first of these that it finds: an expansion whose inputs have grown tenfold since the first measurement;
    the first module, in order of execution, whose output is not finite on this batch; the module from which gradients
    are not finite; the expansion whose inputs are farthest from their start.

    Every process has to call it, since it runs the model; all return what one of them finds on its batch. It removes
    the model's gradients.

    Args:
        model: the model in its present state.
        forward: calls the model on the batch of the step; gradients are examined if it returns the loss.
        rows_so_far: the rows that `SiteMonitor.measure` returned before.
        what: what is not finite, as in "the loss is nan".
        step: number of the step.
    """
    sites = expansions(model)
    # Every process runs the model before it decides anything. With sharded parameters, a process that ran it alone
    # would wait for the others.
    runs, result = _probe(model, forward)
    found = _of_any_process(_grown(sites, rows_so_far) or _not_finite(runs, result))
    if found is None:
        origin = _origin_of_gradient(model, forward, runs)
        found = _from_gradient(origin, rows_so_far) or _farthest(runs, rows_so_far)
    return f"{what} at step {step}: {found or _FINITE + _try(_SLOWER)}"


def _grown(sites: Mapping[str, ExpansionActivation], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Names the expansion whose inputs left their range first and are still outside."""
    first, order = first_rows(rows), list(sites)
    last = _last_rows(rows)

    def left(row: Mapping[str, Any]) -> bool:
        std = row["std"]
        return not math.isfinite(std) or std > _GROWN * first[row["site"]]["std"]

    outside = [row for row in rows if row["site"] in sites and left(row) and left(last[row["site"]])]
    if not outside:
        return None
    row = min(outside, key=lambda row: (row["step"], order.index(row["site"])))
    name, start = row["site"], first[row["site"]]
    measured = f"std {row['std']:.3g} at step {row['step']}"
    if start["step"] != row["step"]:
        measured += (
            f", {start['std']:.3g} at the start"
            if start["step"] == 0
            else f", {start['std']:.3g} at step {start['step']}"
        )
    return f"inputs of {name} left their range first ({measured}): {_try(_for_expansion(sites[name], last[name]))}"


class _Run:
    """One run of a module: the extremes of its floating inputs and outputs, as tensors on the device."""

    def __init__(self, name: str, module: nn.Module, inputs: object, outputs: object) -> None:
        self.name, self.module = name, module
        self.inputs, self.outputs = _extremes(inputs), _extremes(outputs)


def _probe(model: nn.Module, forward: Callable[[], object]) -> tuple[list[_Run], list[Tensor]]:
    """The runs of all modules, in the order in which they ended, and the extremes of the result of `forward`."""
    runs: list[_Run] = []

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, named, output: runs.append(_Run(name, module, (args, named), output))

    handles = [
        module.register_forward_hook(watch(plain_name(model, name) or "the model"), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        with probing(model):
            return runs, _extremes(forward())
    finally:
        for handle in handles:
            handle.remove()


def _not_finite(runs: Sequence[_Run], result: Sequence[Tensor]) -> str | None:
    """Names the first module whose output is not finite, or the loss."""
    for run in runs:
        if not _finite(run.outputs):
            return _at_output(run, comes_first=run.name == runs[0].name)
    if not _finite(result):
        return f"all modules' outputs are finite, but the loss made of them is not: {_try(['other targets', _SKIP])}"
    return None


def _at_output(run: _Run, *, comes_first: bool) -> str:
    name, module = run.name, run.module
    if not all(_local(p).isfinite().all() for p in module.parameters(recurse=False)):
        return f"parameters of {name} are not finite: {_try(['an earlier checkpoint', 'a lower lr', 'a smaller clip'])}"
    if _finite(run.inputs):
        if not isinstance(module, ExpansionActivation):
            return f"{name} is the first module whose output is not finite: {_try(_SLOWER)}"
        low, high = run.inputs[0].tolist()
        settings = _for_expansion(module, None)
        return (
            f"{name} is the first module whose output is not finite (inputs {low:.3g} to {high:.3g}): {_try(settings)}"
        )
    if comes_first:
        return f"what comes into {name}, the first module, is not finite: {_try(['other data', _SKIP])}"
    return f"inputs of {name} are the first numbers that are not finite: {_try(_SLOWER)}"


def _origin_of_gradient(model: nn.Module, forward: Callable[[], object], runs: Sequence[_Run]) -> _Run | None:
    """The last module with a gradient that is not finite, if later modules have finite gradients.

    If even the last module's gradient is not finite, the cause is the loss, and gradients say nothing about the model.
    """
    model.zero_grad(set_to_none=True)
    try:
        with probing(model), torch.enable_grad():
            loss = forward()
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                return None
            loss.backward()
    except torch.OutOfMemoryError:  # a compiled backward pass needs less memory
        return None
    finite: dict[_Run, bool] = {}
    seen: set[int] = set()
    for run in runs:
        for parameter in run.module.parameters(recurse=False):
            # A shared parameter's gradient is the sum over its uses, complete only when the backward pass reaches the
            # first use. So it counts for the first module alone.
            if id(parameter) not in seen and parameter.grad is not None:
                finite[run] = finite.get(run, True) and bool(_local(parameter.grad).isfinite().all())
            seen.add(id(parameter))
    model.zero_grad(set_to_none=True)
    wrong = [run for run in finite if not finite[run]]
    return wrong[-1] if wrong and wrong[-1] is not list(finite)[-1] else None


def _from_gradient(origin: _Run | None, rows: Sequence[Mapping[str, Any]]) -> str | None:
    if origin is None:
        return None
    settings = _SLOWER
    if isinstance(origin.module, ExpansionActivation):
        settings = _for_expansion(origin.module, _last_rows(rows).get(origin.name))
    return f"gradients are not finite from {origin.name} backwards: {_try(settings)}"


def _of_any_process(found: str | None) -> str | None:
    """The finding of the first process that has one, so that all processes say the same and go on together."""
    if not (dist.is_available() and dist.is_initialized()):
        return found
    everything: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, found)
    return next((text for text in everything if text is not None), None)


def _farthest(runs: Sequence[_Run], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Names the expansion whose inputs are farthest from their first mean, in units of their first deviation."""
    first, last = first_rows(rows), _last_rows(rows)
    distances: dict[_Run, float] = {}
    for run in runs:
        if run.name in first and isinstance(run.module, ExpansionActivation):
            start = first[run.name]
            low, high = run.inputs[0].tolist()
            distance = reach(low, high, start["mean"], start["std"])
            distances[run] = max(distance, distances.get(run, 0.0))
    if not distances:
        return None
    run = max(distances, key=lambda run: distances[run])
    assert isinstance(run.module, ExpansionActivation)
    settings = _for_expansion(run.module, last[run.name])
    return (
        f"all outputs are finite; inputs of {run.name} are farthest out, {distances[run]:.3g} standard deviations "
        f"from their mean at the start: {_try(settings)}"
    )


def _last_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The last measurement of each site."""
    return {row["site"]: row for row in rows}


def _for_expansion(expansion: ExpansionActivation, row: Mapping[str, Any] | None) -> list[str]:
    """Settings that may help an expansion, the likeliest first."""
    settings = list(expansion.basis.remedies(expansion.config.clamp))
    if expansion.config.init == "paper":
        settings.append("init=stable")
    drifted = row is not None and row["drift"] > _DRIFTED
    settings.append("a lower expansion_lr" if drifted else "a lower lr or expansion_lr")
    return [*settings, _SKIP]


def _try(settings: Sequence[str]) -> str:
    return f"try {', '.join(settings[:-1])}, or {settings[-1]}"


def _extremes(values: object) -> list[Tensor]:
    """Smallest and largest number of every floating tensor; both are NaN if it holds a NaN."""
    leaves = (leaf for leaf in trees.leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return [torch.stack(torch.aminmax(_local(leaf).detach())) for leaf in leaves if leaf.numel()]


def _finite(extremes: Sequence[Tensor]) -> bool:
    return all(bool(values.isfinite().all()) for values in extremes)


def _local(tensor: Tensor) -> Tensor:
    """This process' part of a sharded tensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
