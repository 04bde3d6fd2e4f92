"""`RewriteReport.check`: runs a rewritten model to verify that every replacement is called, and none is bypassed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx import trees
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.batches import Batch, call
from ortho_fx.errors import OrthoFxError
from ortho_fx.modes import keeping_buffers, keeping_modes
from ortho_fx.passes.observe import copied
from ortho_fx.passes.revert import revert_expansions
from ortho_fx.passes.vocabulary.recognise import changes_input
from ortho_fx.passes.vocabulary.sites import Site
from ortho_fx.rewriting.oracle import Place, Ran
from ortho_fx.watch import watching

_MODES = ("train", "eval")


@dataclass(frozen=True)
class Check:
    """The result of running a rewritten model in train and in eval mode; `RewriteReport.check` makes it.

    Attributes:
        calls: the number of calls of each expansion in each mode.
        uncalled: the expansions that were called in no mode; of several calls that share one, those that were not
            reached, with file and line.
        only_in: the expansions that were called in one mode only, with that mode.
        mutations: replaced in-place modules whose changed input the original model reads again; the rewritten model
            reads the unchanged input there. Calls in source still work in place.
        not_finite: whether an output of the rewritten model is not finite.
        unlisted: the activations that ran and that the report does not name, neither as replaced nor as left. They are
            those that `ortho_fx.rewriting.oracle` sees.
        copied: whether copies of the model ran. One that cannot be copied runs itself, and `mutations` is not looked
            for; its modes, its buffers and the random numbers are then as they were.
    """

    calls: dict[str, dict[str, int]]
    uncalled: tuple[str, ...]
    only_in: dict[str, str]
    mutations: tuple[str, ...]
    not_finite: bool
    unlisted: tuple[str, ...] = ()
    copied: bool = True

    @property
    def passed(self) -> bool:
        """Whether every expansion is called in both modes, by any of its calls, and nothing else is wrong."""
        uncalled = [name for name in self.uncalled if name in self.calls]
        return not (uncalled or self.only_in or self.mutations or self.not_finite or self.unlisted)

    def __str__(self) -> str:
        lines = [f"{name}: never called with these inputs" for name in self.uncalled]
        lines += [f"{name}: called in {mode} mode only" for name, mode in self.only_in.items()]
        lines += [f"{name}: worked in place, and its changed input is read again" for name in self.mutations]
        lines += [f"{place}: runs, and the report does not name it" for place in self.unlisted]
        if self.not_finite:
            lines.append("the outputs are not finite")
        if not self.copied:
            lines.append("the model cannot be copied, so changed inputs were not looked for")
        called = sum(any(modes.values()) for modes in self.calls.values())
        return "\n".join([*lines, f"{called} of {len(self.calls)} expansions called"])


def check_model(model: nn.Module, inputs: Batch, sites: Sequence[Site]) -> Check:
    """Runs copies of a rewritten model in train and in eval mode, without gradients; the model is left alone.

    Raises:
        OrthoFxError: a model without expansions.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, ExpansionActivation)]
    if not names:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion to check: call rewrite_ first")
    calls = {name: dict.fromkeys(_MODES, 0) for name in names}
    finite = True
    ran: dict[Place, None] = {}
    left = [site for site in sites if site.reason]
    shared = {site.name: set(site.lines) for site in sites if not site.reason and len(site.lines) > 1}
    reached: set[tuple[str, str, int]] = set()
    for mode in _MODES:
        trial = _copy_of(model) or model

        def count(name: str, *_: Tensor, mode: str = mode) -> None:
            calls[name][mode] += 1
            if name in shared:
                reached.update((name, *line) for line in _first_of(shared[name]))

        seen = Ran(trial)
        with keeping_modes(trial), keeping_buffers(trial):
            trial.train(mode == "train")
            with watching({name: trial.get_submodule(name) for name in names}, count), seen:
                outputs = _run(trial, inputs)
        ran |= seen.places
        finite &= all(bool(value.isfinite().all()) for value in outputs)
    original = _copy_of(model)
    only = {name: [mode for mode in _MODES if counts[mode]] for name, counts in calls.items()}
    return Check(
        calls=calls,
        uncalled=tuple(
            uncalled
            for name, modes in only.items()
            for uncalled in (_not_reached(name, shared.get(name, set()), reached) if modes else (name,))
        ),
        only_in={name: modes[0] for name, modes in only.items() if len(modes) == 1},
        mutations=tuple(_mutations(original, inputs)) if original is not None else (),
        not_finite=not finite,
        copied=original is not None,
        unlisted=tuple(dict.fromkeys(str(place) for place in ran if not place.is_listed(left))),
    )


# Between the code of a model and an expansion that it calls there are fewer frames of PyTorch and of ortho_fx.
_FRAMES = 16


def _first_of(lines: Collection[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The innermost of these lines, by file and number, from which the expansion was called."""
    frame = inspect.currentframe()
    for _ in range(_FRAMES):
        if frame is None:
            return
        line = Path(frame.f_code.co_filename).name, frame.f_lineno
        if line in lines:
            yield line
            return
        frame = frame.f_back


def _not_reached(
    name: str, lines: Collection[tuple[str, int]], reached: Collection[tuple[str, str, int]]
) -> Iterator[str]:
    found = [line for line in sorted(lines) if (name, *line) in reached]
    # Where none was seen, the calls are those of compiled code, of which no line is known.
    return (f"{name} at {file}:{line}" for file, line in sorted(lines) if found and (file, line) not in found)


def _copy_of(model: nn.Module) -> nn.Module | None:
    """A copy, or None for a model that cannot be copied."""
    try:
        return copied(model)
    except OrthoFxError:
        return None


def _mutations(original: nn.Module, inputs: Batch) -> Iterator[str]:
    """The replaced in-place activations without which the original model has other outputs.

    `original` is a copy of the rewritten model; it is reverted here.
    """
    original.eval()
    reverted = revert_expansions(original, lambda _: True)
    # Calls in source that write to their input still do: only modules that were exchanged can differ.
    in_place = [n for n in reverted if _writes(_held(original, n))]
    if not in_place:
        return
    expected = _run(original, inputs)

    def differs(names: list[str]) -> bool:
        trial = copy.deepcopy(original)
        for name in names:
            _held(trial, name).register_forward_pre_hook(_clone)
        # NaN is equal to itself here: what is not finite is told apart.
        return not all(map(_equal, _run(trial, inputs), expected))

    # One run finds whether there is any, which is rare. Only then is each activation tried alone.
    if differs(in_place):
        yield from (name for name in in_place if differs([name]))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _writes(held: object) -> bool:
    return isinstance(held, nn.Module) and changes_input(held)


def _clone(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.clone() if isinstance(one, Tensor) else one for one in arguments)


def _held(model: nn.Module, name: str) -> Any:
    """The activation of the original model in the place of this expansion; None for a call in source."""
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key, None)


def _run(model: nn.Module, inputs: Batch) -> list[Tensor]:
    """The floating-point outputs, with the same random numbers at each call."""
    with torch.no_grad(), _same_numbers():
        outputs = call(model, copy.deepcopy(inputs))
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [leaf for leaf in trees.leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
