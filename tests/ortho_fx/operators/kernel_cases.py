"""Expansions whose GPU kernels `tests.interpreter` runs: which of them, what they compute, and how far they are off.

    python -m tests.ortho_fx.operators.kernel_cases [hermite float32 ...]

A case is a kind of expansion, its granularity, a dtype, a size and what is around the expansion. There are 675.
`test_kernels.py` runs the few of `COVER`, in which each two values of different settings meet. The command runs all, or
those with the given values: an hour. It prints each error, and at last the largest ones.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ortho_fx.activations.expansion import make_activation
from tests.h100 import Code, triton_code
from tests.interpreter import run
from tests.kinds import COMPILED, config_of
from tests.ortho_fx.operators.expansions import AROUND, LAST, Around, noise


class Size(NamedTuple):
    """The shape that code is generated for, and the one it runs with."""

    generated: tuple[int, ...]
    runs: tuple[int, ...]
    symbolic: bool = False
    last: bool = False
    channel_dim: int = -1


# No power of two divides an odd size; all addresses and sizes of an even one are multiples of 16.
SIZES = {
    "odd": Size((37, 27), (37, 27)),
    "even": Size((32, 48), (32, 48)),
    "symbolic": Size((40, 27), (23, 27), symbolic=True),
    "image": Size((3, 12, 5, 7), (3, 12, 5, 7), channel_dim=1),
    "image last": Size((3, 12, 5, 7), (3, 12, 5, 7), last=True, channel_dim=1),
    # For benchmarks/gpu.py.
    "large": Size((4096, 3072), (4096, 3072)),
}
SETTINGS: dict[str, tuple[str, ...]] = {
    "kind": COMPILED,
    "granularity": ("layer", "channel", "group:3"),
    "dtype": ("float32", "bfloat16", "float16"),
    "size": ("odd", "even", "symbolic", "image", "image last"),
    "around": ("alone", "gate", "residual"),
}


class Case(NamedTuple):
    kind: str
    granularity: str
    dtype: str
    size: str
    around: str

    def __str__(self) -> str:
        return "-".join(self).replace(" ", "_")


# The largest errors that are accepted, for float32 (by kind) and for half precision. Half precision is rounded once, by
# at most half a unit; the gradients of parameters are float32.
LARGEST = {
    "hermite": 12.0,
    "fourier": 16.0,
    "fourier tied": 16.0,
    "tropical": 8.0,
    "tropical_rational": 12.0,
    "safe_rational": 12.0,
    "gelu_series": 12.0,
}
ROUNDED = 0.51


class Outcome(NamedTuple):
    """The largest errors of the output, of the gradients of the inputs, and of those of the parameters.

    Each is in units of the dtype's precision. An error of an element counts relative to its size, and to at least 1. An
    error of a parameter's gradient counts relative to the sum of the sizes of its terms.
    """

    output: float
    inputs: float
    parameters: float

    def is_right(self, case: Case) -> bool:
        # Among so many elements are some that are larger, and some that are rounded worse.
        exact = LARGEST[case.kind] * (2 if case.size == "large" else 1)
        largest = exact if case.dtype == "float32" else ROUNDED
        # The input of a residual has two gradients. Autograd rounds the first before it adds the second.
        gradients = largest * (2 if case.around == "residual" else 1)
        return self.output <= largest and self.inputs <= gradients and self.parameters <= exact


def every_case() -> Iterator[Case]:
    return (Case(*values) for values in itertools.product(*SETTINGS.values()))


def cover() -> list[Case]:
    """Few cases in which each two values of different settings meet: always the case with most new pairs."""
    cases = list(every_case())
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(case: Case) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


class Problem(NamedTuple):
    """A module, its inputs and the gradient of its output; the inputs that code is generated for may differ."""

    module: nn.Module
    example: list[Tensor]
    inputs: list[Tensor]
    tangent: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.inputs, *self.module.parameters(), *self.module.buffers()]


def problem_of(case: Case) -> Problem:
    size, dtype = SIZES[case.size], getattr(torch, case.dtype)
    config = config_of(case.kind, granularity=case.granularity)
    channels = None if case.granularity == "layer" else size.runs[size.channel_dim]
    activation = make_activation(config, channels=channels, channel_dim=None if channels is None else size.channel_dim)
    with torch.no_grad():
        for number, parameter in enumerate(activation.parameters()):
            # Every group has another expansion.
            parameter.add_(0.1 * noise(*parameter.shape, seed=number))
    function, count = AROUND[case.around]

    def tensor(shape: tuple[int, ...], seed: int) -> Tensor:
        layout = LAST if size.last else torch.contiguous_format
        return noise(*shape, seed=seed, dtype=dtype).to(memory_format=layout)

    example, inputs = (
        [tensor(shape, 10 + number).requires_grad_() for number in range(count)]
        for shape in (size.generated, size.runs)
    )
    return Problem(Around(activation, function), example, inputs, tensor(size.runs, 20))


def code_of(case: Case, problem: Problem) -> Code:
    return triton_code(problem.module, *problem.example, dynamic=SIZES[case.size].symbolic)


def exact(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output and the gradients of inputs and parameters by the eager operators in float64."""
    tensors = [t.detach().double().requires_grad_(t.requires_grad) for t in problem.tensors]
    count = len(problem.inputs)
    names = [name for name, _ in [*problem.module.named_parameters(), *problem.module.named_buffers()]]
    given = dict(zip(names, tensors[count:], strict=True))
    y = torch.func.functional_call(problem.module, given, tuple(tensors[:count]))
    wanted = [t for t in tensors if t.requires_grad]
    return y.detach(), torch.autograd.grad(y, wanted, problem.tangent.double())


def outcome_of(problem: Problem, code: Code) -> Outcome:
    """Runs the code and compares.

    Raises:
        AssertionError: an access that is a fault, an unwritten element, or what `compare` raises.
    """
    (y,), gradients = run(code, problem.tensors, [problem.tangent], complete=True)
    return compare(problem, y, [g for g, t in zip(gradients, problem.tensors, strict=True) if t.requires_grad])


def compare(problem: Problem, y: Tensor, found: Sequence[Tensor], ignored: float = 0.0) -> Outcome:
    """The errors of an output and of the gradients of all tensors that require one.

    A share of the elements of the inputs' gradients may be ignored, those with the largest errors.

    Raises:
        AssertionError: a result of another dtype or shape.
    """
    expected, expected_gradients = exact(problem)
    needed = [t for t in problem.tensors if t.requires_grad]
    assert y.dtype == problem.tangent.dtype, y.dtype
    for gradient, tensor in zip(found, needed, strict=True):
        assert (gradient.dtype, gradient.shape) == (tensor.dtype, tensor.shape)
    count = len(problem.inputs)
    pairs = list(zip(found, expected_gradients, strict=True))
    groups = math.prod(found[count].shape[1:])
    terms = problem.tangent.numel() / groups
    return Outcome(
        _error(y, expected),
        max(_error(*pair, ignored=ignored) for pair in pairs[:count]),
        # About so large is a sum of random terms.
        max(_error(*pair, least=terms**0.5) for pair in pairs[count:]),
    )


def _error(actual: Tensor, expected: Tensor, least: float = 1.0, ignored: float = 0.0) -> float:
    distance = (actual.double() - expected).abs() / expected.abs().clamp(min=least)
    if ignored:
        distance = distance.flatten().topk(1 + int(ignored * distance.numel())).values[-1]
    return float(distance.max().nan_to_num(math.inf)) / torch.finfo(actual.dtype).eps


def main() -> None:
    wanted = sys.argv[1:]
    cases = [case for case in every_case() if all(any(w == value for value in case) for w in wanted)]
    worst: dict[tuple[str, str], list[float]] = {}
    wrong = 0
    for case in cases:
        start = time.perf_counter()
        try:
            problem = problem_of(case)
            outcome = outcome_of(problem, code_of(case, problem))
        except Exception as error:
            wrong += 1
            print(f"{case}: {type(error).__name__}: {error}", flush=True)
            continue
        shown = ", ".join(f"{error:.2f}" for error in outcome)
        if not outcome.is_right(case):
            wrong += 1
            shown = f"WRONG: {shown}"
        print(f"{case}: {shown} eps, {time.perf_counter() - start:.1f} s", flush=True)
        before = worst.setdefault((case.kind, case.dtype), [0.0] * 3)
        worst[case.kind, case.dtype] = list(map(max, before, outcome))
    print(f"{len(cases)} cases, {wrong} of them wrong; largest errors of output, inputs and parameters in eps:")
    for (kind, dtype), errors in worst.items():
        print(f"{kind:18} {dtype:9}", " ".join(f"{error:7.2f}" for error in errors))


if __name__ == "__main__":
    main()
