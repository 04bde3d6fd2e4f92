"""The checks of single compiled expansions: the lowering, their values and their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from compat_case import SINGLE, Case, Wrong, off
from torch import Tensor

from ortho_fx import ExpansionConfig
from ortho_fx.activations.expansion import make_activation
from ortho_fx.bases import BASES, Basis
from ortho_fx.operators import generated_code, operator, support

# By granularity, the shape of the input and the dimension of its channels. It is large enough for sums in two stages.
SHAPES = {"layer": ((4, 32, 14, 14), 1), "channel": ((256, 96), 1)}


class Compiled:
    """A single compiled expansion: its results, the operators of its graphs, and the numbers of its kernels."""

    def __init__(self, basis: Basis, granularity: str, lowered: bool) -> None:
        self.basis, self.operators = basis, list[str]()
        self.grad, *self.tensors = tensors_of(basis, granularity, *SHAPES[granularity])
        self.inputs = [tensor.clone().requires_grad_() for tensor in self.tensors]
        torch.compiler.reset()
        with nullcontext() if lowered else support.without_lowering(), generated_code.generated_code() as codes:
            call = torch.compile(operator(basis), options={"post_grad_custom_post_pass": self._note})
            self.output = call(*self.inputs, SHAPES[granularity][1])
            self.output.backward(self.grad)
        counts = generated_code.count_kernels(codes)
        self.kernels = [counts["forward"], counts["backward"]]

    def _note(self, graph: torch.fx.Graph) -> None:
        self.operators += [str(node.target) for node in graph.nodes if node.op == "call_function"]

    @property
    def ours(self) -> list[str]:
        """The operators that our own lowering handles."""
        return [name for name in self.operators if name.startswith("ortho_fx_inductor.")]

    def error(self) -> float:
        """The relative error of output and gradients, compared with eager float64."""
        exact = [tensor.double().requires_grad_() for tensor in self.tensors]
        y = operator(self.basis)(*exact)
        y.backward(self.grad.double())
        learned = [True, *(parameter.learnable for parameter in self.basis.parameters)]
        sides = [
            [output.detach(), *(t.grad for t, ours in zip(inputs, learned, strict=True) if ours)]
            for output, inputs in ((self.output, self.inputs), (y, exact))
        ]
        return off(*sides, SINGLE)


def tensors_of(basis: Basis, granularity: str, shape: Sequence[int], dim: int) -> list[Tensor]:
    """The output's gradient, an input, and parameters that differ from channel to channel."""
    channels = None if granularity == "layer" else shape[dim]
    activation = make_activation(ExpansionConfig(basis.name, granularity=granularity), channels=channels)
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = [torch.randn(*shape, generator=generator) for _ in range(2)]
    for parameter in basis.parameters:
        value = getattr(activation, parameter.name).detach()
        tensors.append(value + 0.1 * torch.randn(value.shape, generator=generator))
    return tensors


compiled = cache(Compiled)


def each_expansion(call: Callable[[Basis, str], Any]) -> Iterator[Case]:
    for basis in BASES.values():
        for granularity in SHAPES:
            yield f"{basis.name} a {granularity}", partial(call, basis, granularity)


def lowering() -> Iterator[Case]:
    def used(basis: Basis, granularity: str) -> str:
        found = compiled(basis, granularity, True).ours
        reason = support.reason(basis)
        if reason is not None:
            raise Wrong(reason)
        parts = ("_prepare", "", "_backward") if basis.maxima else ("", "_backward")
        if found != [f"ortho_fx_inductor.{basis.name}{part}.default" for part in parts]:
            raise Wrong(f"our own kernels took {', '.join(found) or 'no operator'}")
        return "used"

    yield from each_expansion(used)


def values() -> Iterator[Case]:
    yield from each_expansion(lambda basis, granularity: compiled(basis, granularity, True).error())


def plain() -> Iterator[Case]:
    def right(basis: Basis, granularity: str) -> float:
        graphs = compiled(basis, granularity, False)
        if graphs.ours:
            raise Wrong(f"our own kernels took {', '.join(graphs.ours)}")
        return graphs.error()

    yield from each_expansion(right)


def kernels() -> Iterator[Case]:
    def counted(basis: Basis, granularity: str) -> dict[str, list[int]]:
        with_it, without = (compiled(basis, granularity, lowered).kernels for lowered in (True, False))
        if min(with_it) < 1 or any(ours > theirs for ours, theirs in zip(with_it, without, strict=True)):
            raise Wrong(f"forward and backward with the lowering {with_it}, without it {without}")
        return {"lowering": with_it, "plain": without}

    yield from each_expansion(counted)
