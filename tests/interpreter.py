"""Runs the Triton code that `tests.h100` generates, on CPU tensors and without Triton.

    x = torch.randn(48, 64, requires_grad=True)
    code = triton_code(F.gelu, x)
    outputs, gradients = run(code, [x], [torch.ones(48, 64)])

The `call` function of each generated wrapper is executed unchanged, with its buffers on the CPU. A kernel's text is
executed once for each program of its grid. A block is a torch tensor, and `tl` has the few functions of Triton that
Inductor uses; a kernel that uses another one raises an AttributeError.

Every access is checked, and so are the promises that a kernel was compiled with (`tests.kernel_memory` has the list):
bounds, memory that nothing wrote, races between programs, dtypes, multiples of 16. Buffers start as NaN, and so do
masked lanes of a load that have no other value, so that values which were never written show in the result. The
interpreter does not see the order of sums inside a block, fused multiply-adds, approximate functions and races between
the threads of one program.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.h100 import Code, Graph, Kernel
from tests.kernel_memory import Launch, Memory, Target, check_claims

# Any power of two is correct. These are small, so that small tensors take several programs and several loops.
BLOCKS = {"XBLOCK": 8, "YBLOCK": 8, "ZBLOCK": 8, "R0_BLOCK": 16, "NUM_STAGES": 1}


def run(
    code: Code,
    tensors: Sequence[Tensor],
    tangents: Sequence[Tensor],
    blocks: dict[str, int] | None = None,
    complete: bool = False,
) -> tuple[list[Tensor], list[Any]]:
    """The outputs, and the gradients of the tensors (None for a tensor without a gradient).

    `tensors` are the inputs with which the code was generated, then a module's parameters and buffers. Sizes that are
    symbolic in the code may be others than those it was generated for. `tangents` are the gradients of the outputs.
    `blocks` replaces block sizes of `BLOCKS`. With `complete`, a result that was not written everywhere is an error.
    """
    memory, chosen = Memory(), {**BLOCKS, **(blocks or {})}
    primals: list[Any] = [None if number is None else tensors[number].detach() for number in code.arguments]
    for place, (argument, dim) in code.sizes.items():
        primals[place] = primals[argument].shape[dim]
    results = call_graph(code.forward, primals, memory, chosen)
    if complete:
        _assert_written(memory, results)
    outputs, saved = results[: len(tangents)], results[len(tangents) :]
    gradients: list[Any] = [None] * len(tensors)
    if code.backward is not None:
        # AOTAutograd gives tangents the strides of their outputs, and saved sizes before saved tensors.
        laid_out = [torch.empty_like(y).copy_(tangent) for y, tangent in zip(outputs, tangents, strict=True)]
        saved = sorted(saved, key=lambda value: isinstance(value, Tensor))
        found = call_graph(code.backward, [*saved, *laid_out], memory, chosen)
        if complete:
            _assert_written(memory, found)
        for number, gradient in zip(code.arguments, found, strict=True):
            if number is not None:
                gradients[number] = gradient
    return outputs, gradients


def call_graph(
    graph: Graph, arguments: Sequence[Any], memory: Memory | None = None, blocks: dict[str, int] | None = None
) -> list[Any]:
    """Runs the wrapper of a graph and returns its results."""
    # A buffer whose memory another one gets: `buf2 = buf0; del buf0  # reuse`.
    source = re.sub(r"^( +)(\w+) = .*; del \w+  # reuse$", r"\g<0>\n\1_reuse(\2)", graph.source, flags=re.MULTILINE)
    # PyTorch's own functions write too: `buf3.copy_(workspace_0...)`.
    source = re.sub(r"^( +)(\w+)\.(copy|zero|fill)_\(.*$", r"\g<0>\n\1_written(\2)", source, flags=re.MULTILINE)
    (call,) = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "call"
    )
    memory, blocks = memory or Memory(), blocks or BLOCKS

    def allocate(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = _empty(size, stride, dtype)
        memory.allocate(tensor)
        return tensor

    scope = {
        **_WRAPPER,
        **{kernel.name: _Launcher(kernel, memory, blocks) for kernel in graph.kernels},
        "empty_strided_cuda": allocate,
        "extern_kernels": _Library(memory),
        "_reuse": memory.reuse,
        "_written": memory.written,
    }
    exec(compile(ast.Module([call], []), "<wrapper>", "exec"), scope)
    others = [None] * (len(call.args.args) - 1)  # `self`, if `call` is a method of the Runner
    return list(scope["call"](*others, list(arguments)))


def _assert_written(memory: Memory, results: Sequence[Any]) -> None:
    for number, result in enumerate(results):
        count = memory.unwritten(result) if isinstance(result, Tensor) else 0
        assert not count, f"nothing wrote {count} of the {result.numel()} elements of result {number}"


# The wrapper's functions.


def _empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty_strided(size, stride, dtype=dtype)
    whole = tensor.as_strided((tensor.untyped_storage().nbytes() // dtype.itemsize,), (1,), 0)
    whole.fill_(math.nan if dtype.is_floating_point else -1 if dtype != torch.bool else True)
    return tensor


def _view(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def _assert_size_stride(tensor: Tensor, size: Sequence[int], stride: Sequence[int], *_: Any) -> None:
    strides = zip(size, tensor.stride(), stride, strict=True)
    assert tensor.shape == tuple(size), (tensor.shape, size)
    assert all(actual == expected for length, actual, expected in strides if length > 1), (tensor.stride(), stride)


def _assert_sizes_strides(tensors: Sequence[Tensor], sizes: Any, strides: Any, *_: Any) -> None:
    for each in zip(tensors, sizes, strides, strict=True):
        _assert_size_stride(*each)


class _Torch:
    """PyTorch, without the choice of a GPU."""

    cuda = SimpleNamespace(_DeviceGuard=lambda index: contextlib.nullcontext(), set_device=lambda index: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Library:
    """PyTorch's functions as calls of libraries, which read whole tensors and write the one that they get as `out`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            for number, argument in enumerate(arguments):
                count = self._memory.unwritten(argument) if isinstance(argument, Tensor) else 0
                assert not count, f"{name} reads {count} elements of argument {number}, which nothing wrote"
            result = getattr(torch, name)(*arguments, **settings)
            if "out" in settings:
                self._memory.written(settings["out"])
            return result

        return call


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


_WRAPPER: dict[str, Any] = {
    "torch": _Torch(),
    "aten": torch.ops.aten,
    "reinterpret_tensor": _view,
    "assert_size_stride": _assert_size_stride,
    "assert_size_stride_grouped": _assert_sizes_strides,
    "assert_alignment": lambda *_: None,
    "copy_if_misaligned": _aligned,
    "copy_misaligned": _aligned,
    "get_raw_stream": lambda index: None,
}


# Kernels.


class _Launcher:
    """A kernel with its block sizes and its grid."""

    def __init__(self, kernel: Kernel, memory: Memory, blocks: dict[str, int]) -> None:
        body = kernel.definition[kernel.definition.index("@triton.jit") :]
        self._program = compile(
            ast.fix_missing_locations(_NoChangeInPlace().visit(ast.parse(body))), "<kernel>", "exec"
        )
        self._name, self._memory = kernel.name, memory
        self._signature, self._constants, configs = (
            ast.literal_eval(re.findall(rf"'{key}': (\{{.*?\}}|\[.*?\}}\])[,}}]", kernel.definition)[0])
            for key in ("signature", "constants", "configs")
        )
        names = list(self._signature)
        self._divisible = [names[index] for (index,), claims in configs[0].items() if ["tt.divisibility", 16] in claims]
        self._parameters = [name for name in names if not name.isupper()]
        self._sizes = {name: int(size) for name, size in re.findall(r"^ +(\w*numel) = (\d+)$", body, re.MULTILINE)}
        # No block is longer than its axis, up to a power of two: a kernel needs no mask along an axis of length one.
        longest = {f"{axis.upper()}BLOCK": hint for axis, hint in kernel.size_hints.items()}
        self._blocks = {n: min(blocks[n], longest.get(n, blocks[n])) for n in self._signature if n in blocks}
        (grid,) = re.findall(r"'grid_type': '(\w+)'", kernel.definition)
        self._steps = {axis: self._blocks.get(f"{axis.upper()}BLOCK", 1) for axis in "xyz"}
        if grid == "MixOrderReductionGrid":
            # The wrapper's sizes depend on this value, so it is not free.
            (split,) = map(int, re.findall(r"'RSPLIT_SIZE': (\d+)", kernel.definition))
            self._blocks["RSPLIT_SIZE"] = self._steps["x"] = split
        else:
            assert grid in ("Grid1D", "Grid2D", "Grid3D"), grid

    def run(self, *values: Any, stream: None) -> None:
        arguments = dict(zip(self._parameters, values, strict=True))
        check_claims(self._name, arguments, self._signature, self._constants, self._divisible, self._sizes)
        grid = [-(-arguments.get(f"{axis}numel", 1) // self._steps[axis]) for axis in "xyz"]
        launch = Launch(self._memory, self._name)
        given = {
            name: _Pointer(Target(launch, name, v)) if isinstance(v, Tensor) else v for name, v in arguments.items()
        }
        for number, place in enumerate(itertools.product(*map(range, grid))):
            launch.program = number
            scope = {"tl": _Language(place, grid), **_KERNEL}
            exec(self._program, scope)
            scope[self._name](**given, **self._blocks)
        launch.finish()


class _NoChangeInPlace(ast.NodeTransformer):
    """Turns x += 1 into x = x + 1, its meaning in Triton; x += 1 would change a torch tensor in place."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.Assign:
        assert isinstance(node.target, ast.Name)
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)


@dataclass(frozen=True)
class _Pointer:
    """Positions in a tensor's memory, counted from its first element."""

    target: Target
    offset: Any = 0

    def __add__(self, offset: Any) -> _Pointer:
        return _Pointer(self.target, self.offset + offset)


class _Language:
    """`triton.language`, in one program of a grid."""

    constexpr = int
    int1, int8, int16, int32, int64, uint8 = torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8
    float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

    def __init__(self, place: Sequence[int], grid: Sequence[int]) -> None:
        self._place, self._grid = place, grid

    def program_id(self, axis: int) -> Tensor:
        return torch.tensor(self._place[axis])

    def num_programs(self, axis: int) -> int:
        return self._grid[axis]

    @staticmethod
    def load(pointer: _Pointer, mask: Any = None, other: Any = None, eviction_policy: str = "") -> Tensor:
        # In a `cat` Inductor loads constant positions without a mask and does not use values after the tensor's end.
        target = pointer.target
        offset, meant = target.places(pointer.offset, mask, beyond=True)
        target.read(offset[meant])
        values = target.elements[torch.where(meant, offset, 0)]
        undefined = math.nan if values.is_floating_point() else -1
        return torch.where(meant, values, torch.as_tensor(undefined if other is None else other).to(values.dtype))

    @staticmethod
    def store(pointer: _Pointer, value: Tensor, mask: Any = None) -> None:
        target = pointer.target
        offset, values = _stored(target, pointer.offset, value, mask)
        target.check_stored(offset, values)
        target.write(offset)
        target.elements[offset] = values.to(target.dtype)

    @staticmethod
    def atomic_add(pointer: _Pointer, value: Tensor, mask: Any = None, sem: str = "") -> None:
        target = pointer.target
        offset, values = _stored(target, pointer.offset, value, mask)
        target.read_atomically(offset)
        target.write(offset, atomic=True)
        target.elements.index_put_((offset,), values.to(target.dtype), accumulate=True)

    @staticmethod
    def multiple_of(value: Any, factor: Any) -> Any:
        """A promise: what follows no neighbour (one less) is a multiple."""
        number, numbers = int(_single(factor)), torch.as_tensor(value).reshape(-1)
        first = torch.ones(numbers.shape, dtype=torch.bool)
        first[1:] = numbers[1:] != numbers[:-1] + 1
        assert not (numbers[first] % number).any(), f"said to be multiples of {number}: {numbers[first].tolist()}"
        return value

    @staticmethod
    def max_contiguous(value: Tensor, length: Any) -> Tensor:
        """A promise: each `length` values are neighbours."""
        number = min(int(_single(length)), value.numel())
        rows = value.reshape(-1, number)
        assert (rows == rows[:, :1] + torch.arange(number)).all(), f"said to be {number} neighbours: {rows.tolist()}"
        return value

    @staticmethod
    def assume(condition: Any) -> None:
        assert torch.as_tensor(condition).all(), "an assumption of the kernel does not hold"

    @staticmethod
    def range(*limits: Any, num_stages: int = 1) -> Iterator[int]:
        return iter(range(*map(int, limits)))

    @staticmethod
    def arange(start: int, end: int) -> Tensor:
        length = end - start
        assert length & (length - 1) == 0, f"a block of {length} is no power of two"
        return torch.arange(start, end)

    @staticmethod
    def full(shape: Sequence[int], value: Any, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    @staticmethod
    def device_assert(condition: Any, message: str) -> None:
        assert torch.as_tensor(condition).all(), message

    PropagateNan = SimpleNamespace(ALL=None)

    @staticmethod
    def maximum(x: Tensor, y: Tensor, propagate_nan: None) -> Tensor:
        return torch.maximum(x, y)

    @staticmethod
    def minimum(x: Tensor, y: Tensor, propagate_nan: None) -> Tensor:
        return torch.minimum(x, y)

    @staticmethod
    def debug_barrier() -> None:
        pass

    @staticmethod
    def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (x.double() * y + z).to(x.dtype)

    where = staticmethod(torch.where)
    sum = staticmethod(torch.sum)
    broadcast_to = staticmethod(torch.broadcast_to)
    sigmoid = staticmethod(torch.sigmoid)
    sqrt_rn = staticmethod(torch.sqrt)
    div_rn = staticmethod(torch.div)


def _stored(target: Target, offset: Any, value: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """The positions that a store means, and their values."""
    offset, meant = target.places(offset, mask)
    shape = torch.broadcast_shapes(offset.shape, value.shape)
    values, offset, meant = (each.expand(shape) for each in (value, offset, meant))
    return offset[meant], values[meant]


def _single(value: Any) -> Any:
    return value[-1] if isinstance(value, (list, tuple)) else value


def _sort_with_index(
    values: Tensor, numbers: Tensor, count: int | None, dim: int, stable: bool, descending: bool
) -> tuple[Tensor, Tensor]:
    if count is not None:
        # Lanes after the last element stay last.
        behind = torch.arange(values.shape[dim]) >= count
        values = torch.where(behind, -math.inf if descending else math.inf, values)
    values, order = values.sort(dim=dim, descending=descending, stable=True)
    return values, numbers.expand(values.shape).gather(dim, order)


def _over(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """An elementwise function that takes numbers too."""
    return lambda *values: function(*map(torch.as_tensor, values))


_FUNCTIONS = "abs ceil cos erf exp exp2 floor isinf isnan lgamma log log2 pow rsqrt sin sqrt tan tanh trunc".split()
_MATH = SimpleNamespace(**{name: _over(getattr(torch, name)) for name in _FUNCTIONS}, nearbyint=_over(torch.round))
_KERNEL: dict[str, Any] = {
    "triton": SimpleNamespace(jit=lambda function: function),
    "libdevice": _MATH,
    "tl_math": _MATH,
    "triton_helpers": SimpleNamespace(
        any=lambda values, dim: values.any(dim),
        fmax2=lambda values, dim: values.amax(dim),
        max2=lambda values, dim: values.amax(dim),
        min2=lambda values, dim: values.amin(dim),
        maximum=_over(torch.maximum),
        minimum=_over(torch.minimum),
        promote_to_tensor=torch.as_tensor,
        sort_with_index=_sort_with_index,
    ),
}
