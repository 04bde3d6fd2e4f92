"""Small modules whose calls are hard to find or to name, and what becomes of them by edited source and by the mode."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from function_mode_calls import answer_by
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ortho_fx.passes.search import find_occurrences
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.targets import choose_targets


class Cubic(Expansion):
    """A function that is no activation, with a parameter."""

    def __init__(self, value: float = 0.5) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.value * x + 0.1 * x**3


class Case(nn.Module):
    """One call of GELU, in the subclasses in a way that the source front end leaves, or hard to name.

    `written_out` is the same with an expansion at each place; `by_text` is the expansion of each call in the text,
    where those after the second are copies.
    """

    by_text: tuple[int, ...] = (0,)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))

    def written_out(self, x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        return first(self.linear(x))

    def edited(self) -> None:
        """What a user does afterwards."""


class BySuper(Case):
    """The parent's forward, through super()."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ByName(Case):
    """getattr(F, name), by a name that is a plain argument."""

    def forward(self, x: Tensor, name: str = "gelu") -> Tensor:
        return getattr(F, name)(self.linear(x))


class Starred(Case):
    """F.gelu(*arguments)."""

    def forward(self, x: Tensor) -> Tensor:
        arguments = (self.linear(x),)
        return F.gelu(*arguments)


class ByCallable:
    """A decorator whose wrapper closes over an object that holds the function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def wrapper(self) -> Callable[..., Tensor]:
        @functools.wraps(self.function)
        def call(module: nn.Module, x: Tensor) -> Tensor:
            return self.function(module, x)

        return call


class Wrapped(Case):
    """A decorator that does not close over the function."""

    def inner(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))

    forward = ByCallable(inner).wrapper()


class OwnForward(Case):
    """An instance with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = types.MethodType(Case.forward, self)


class HandedOn(Case):
    """checkpoint(F.gelu, x)."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(F.gelu, self.linear(x), use_reentrant=self.reentrant)


class HandedOnReentrant(HandedOn):
    """checkpoint(F.gelu, x, use_reentrant=True)."""

    reentrant = True


class MethodHandedOn(Case):
    """checkpoint(self.inner, x), which the source front end takes."""

    def inner(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=True)


_CODE = "class WithoutSource(Case):\n    def forward(self, x):\n        return F.gelu(self.linear(x))\n"
exec(_CODE)
WithoutSource: type[Case] = globals()["WithoutSource"]
WithoutSource.__doc__ = "A class that exec made, without a source."


class Recursive(Case):
    """A module that calls itself."""

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        x = F.gelu(self.linear(x))
        return self(x, depth - 1) if depth else x

    def written_out(self, x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        return first(self.linear(first(self.linear(x))))


class WithChildren(Case):
    """Children with the same call: an activation, and an owner of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.inner = nn.GELU(), Case()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(self.inner(self.act(x))))

    def written_out(self, x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        return first(self.linear(F.gelu(self.inner.linear(F.gelu(x)))))


class ChildsForward(WithChildren):
    """A child's forward that is called without its hooks: `self.inner.forward(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(self.inner.forward(self.act(x))))


class ChildsHook(Case):
    """A hook that a user puts on a child later, with the same call in it."""

    def edited(self) -> None:
        self.linear.register_forward_hook(lambda module, args, output: F.gelu(output))


class Loop(Case):
    """One call in a loop: one expansion by its place, one for each turn by its number."""

    turns = 2

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.turns):
            x = F.gelu(self.linear(x))
        return x

    def written_out(self, x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        for _ in range(self.turns):
            x = first(self.linear(x))
        return x


class LongerLoop(Loop):
    """More turns than were seen."""

    turns = 4


class OtherOrder(Case):
    """Two calls in one order in train and in the other in eval."""

    by_text = (0, 1, 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.gelu(x) + F.gelu(self.linear(x))
        y = F.gelu(self.linear(x))
        return F.gelu(x) + y

    def written_out(self, x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        return first(x) + second(self.linear(x))


LEFT = (BySuper, ByName, Starred, Wrapped, OwnForward, WithoutSource, HandedOn, HandedOnReentrant)  # by edited source
HARD = (MethodHandedOn, Recursive, WithChildren, ChildsForward, ChildsHook, Loop, LongerLoop, OtherOrder)
CASES = (*LEFT, *HARD)

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
Run = Callable[[Tensor], Tensor]


def gradients(model: nn.Module, run: Run) -> list[Tensor]:
    """The output and the gradients of the input and of each parameter that has one."""
    model.zero_grad()
    x = X.clone().requires_grad_()
    output = run(x)
    output.square().sum().backward()
    return [output, *(t.grad for t in (x, *model.parameters()) if t.grad is not None)]


def each_gradient(model: nn.Module) -> list[Tensor]:
    """The gradients of the parameters for each row of X, by vmap."""
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradient = torch.func.grad(lambda values, x: torch.func.functional_call(model, values, (x,)).square().sum())
    return list(torch.func.vmap(gradient, in_dims=(None, 0))(values, X).values())


def row_by_row(model: nn.Module, written: Run) -> list[Tensor]:
    found = []
    for x in X:
        loss = written(x).square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
    return [torch.stack(each) for each in zip(*found, strict=True)]


def exported(model: nn.Module, strict: bool) -> Tensor:
    return torch.export.export(model, (X,), strict=strict).module()(X)


def in_threads(model: nn.Module) -> list[Tensor]:
    outputs: list[Tensor] = []
    threads = [threading.Thread(target=lambda: outputs.extend(model(X) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outputs


def checks(model: Case, written: Run) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """What is computed with the model, and the same with the computation that is written out."""
    plain = functools.partial(written, X)
    yield "eval", lambda: model.eval()(X), lambda: model.eval() and written(X)
    model.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    yield "gradients", lambda: gradients(model, model), lambda: gradients(model, written)
    yield "compiled", lambda: gradients(model, compiled), lambda: gradients(model, written)
    yield "exported, strict", lambda: exported(model, True), plain
    yield "exported", lambda: exported(model, False), plain
    yield "copied", lambda: copy.deepcopy(model)(X), plain
    yield "pickled", lambda: pickle.loads(pickle.dumps(model))(X), plain
    yield "vmap of grad", lambda: each_gradient(model), lambda: row_by_row(model, written)
    recomputed = functools.partial(checkpoint, model, use_reentrant=False)
    yield "recomputed", lambda: gradients(model, recomputed), lambda: gradients(model, written)
    yield "traced", lambda: torch.fx.symbolic_trace(model)(X), plain
    yield "threads", lambda: in_threads(model), lambda: [written(X)] * 80


def outcome(get: Callable[[], Any], want: Callable[[], Any]) -> str:
    torch.compiler.reset()
    try:
        got = get()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    got, wanted = ([value] if isinstance(value, Tensor) else value for value in (got, want()))
    right = len(got) == len(wanted) and all(map(functools.partial(torch.allclose, atol=1e-6), got, wanted))
    return "right" if right else "another value"


def measure_case(cls: type[Case]) -> dict[str, Any]:
    torch.manual_seed(0)
    untouched = cls()
    edited = {}
    for way in ("source", "mode"):
        model, expansions = copy.deepcopy(untouched), (Cubic(0.5), Cubic(0.25))
        if way == "mode":
            answer_by(model, {f"gelu_call_{number}": expansion for number, expansion in enumerate(expansions)})
        else:
            found = find_occurrences(model, choose_targets(None), sharing="call")
            calls = [one for one in found if one.owner is model and one.site.location]
            for number, (call, like) in enumerate(zip(calls, cls.by_text, strict=True)):
                if not call.site.reason:
                    call.substitute(expansions[number] if number < 2 else copy.deepcopy(expansions[like]))
            left = "; ".join(sorted({call.site.reason for call in calls}))
        edited[way] = (model, expansions)
    for model in (untouched, *(model for model, _ in edited.values())):
        model.edited()
    row: dict[str, Any] = {"what": (cls.__doc__ or "").rstrip(".")}
    possible = [outcome(*one) == "right" for _, *one in checks(untouched, functions(untouched, F.gelu, F.gelu))]
    for way, (model, expansions) in edited.items():
        found = {
            name: outcome(*one) if works else "not without it either"
            for works, (name, *one) in zip(possible, checks(model, functions(model, *expansions)), strict=True)
        }
        row[way] = {name: text for name, text in found.items() if text != "right"} or "right in all"
    if left:
        row["source"] = f"leaves it: {left}"
    return row


def functions(model: Case, *expansions: Callable[[Tensor], Tensor]) -> Run:
    return lambda x: model.written_out(x, *expansions)
