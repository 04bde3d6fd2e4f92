"""`RewriteReport.check`: runs a rewritten model to see that every replacement is called, and none is gone round."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx import trees
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.batches import Batch, call
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.observe import copied
from ortho_fx.passes.revert import revert_expansions
from ortho_fx.passes.vocabulary.recognise import changes_input

_MODES = ("train", "eval")


@dataclass(frozen=True)
class Check:
    """What running a rewritten model showed.

    Attributes:
        calls: how often each expansion was called in train and in eval mode.
        uncalled: the expansions that neither mode called.
        only_in: those that one mode alone called, with that mode.
        mutations: the modules that worked in place before they were replaced, and whose changed input the model reads
            again: the rewritten model computes with the unchanged one. Calls in source still work in place.
        not_finite: whether an output of the rewritten model is not finite.
    """

    calls: dict[str, dict[str, int]]
    uncalled: tuple[str, ...]
    only_in: dict[str, str]
    mutations: tuple[str, ...]
    not_finite: bool

    @property
    def passed(self) -> bool:
        """Whether every expansion is called in both modes, and nothing else is to be said."""
        return not (self.uncalled or self.only_in or self.mutations or self.not_finite)

    def __str__(self) -> str:
        lines = [f"{name}: never called with these inputs" for name in self.uncalled]
        lines += [f"{name}: called in {mode} mode only" for name, mode in self.only_in.items()]
        lines += [f"{name}: worked in place, and its changed input is read again" for name in self.mutations]
        if self.not_finite:
            lines.append("the outputs are not finite")
        called = len(self.calls) - len(self.uncalled)
        return "\n".join([*lines, f"{called} of {len(self.calls)} expansions called"])


def check_model(model: nn.Module, inputs: Batch) -> Check:
    """Runs copies of a rewritten model in train and in eval mode, without gradients; the model is left alone.

    Raises:
        OrthoFxError: a model without expansions, or one that cannot be copied.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, ExpansionActivation)]
    if not names:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion to check: call rewrite_ first")
    calls = {name: dict.fromkeys(_MODES, 0) for name in names}
    finite = True
    for mode in _MODES:
        trial = copied(model).train(mode == "train")
        for name in names:

            def count(*_: Any, name: str = name, mode: str = mode) -> None:
                calls[name][mode] += 1

            trial.get_submodule(name).register_forward_pre_hook(count)
        outputs = _run(trial, inputs)
        finite &= all(bool(value.isfinite().all()) for value in outputs)
    only = {name: [mode for mode in _MODES if counts[mode]] for name, counts in calls.items()}
    return Check(
        calls=calls,
        uncalled=tuple(name for name, modes in only.items() if not modes),
        only_in={name: modes[0] for name, modes in only.items() if len(modes) == 1},
        mutations=tuple(_mutations(model, inputs)),
        not_finite=not finite,
    )


def _mutations(model: nn.Module, inputs: Batch) -> Iterator[str]:
    """The replaced in-place activations without which the original model computes something else."""
    original = copied(model).eval()
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
        return not all(map(torch.equal, _run(trial, inputs), expected))

    # One run tells whether any does, which is rare; only then each is tried alone.
    if differs(in_place):
        yield from (name for name in in_place if differs([name]))


def _writes(held: object) -> bool:
    return isinstance(held, nn.Module) and changes_input(held)


def _clone(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.clone() if isinstance(one, Tensor) else one for one in arguments)


def _held(model: nn.Module, name: str) -> Any:
    """What the original holds where the rewritten model has this expansion; None for a call in source."""
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key, None)


def _run(model: nn.Module, inputs: Batch) -> list[Tensor]:
    """The floating outputs, with the same random numbers at each call."""
    with torch.no_grad(), _same_numbers():
        outputs = call(model, copy.deepcopy(inputs))
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [leaf for leaf in trees.leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
