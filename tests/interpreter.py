"""Runs the Triton code that `tests.h100` generates, on CPU tensors and without Triton.

    x = torch.randn(48, 64, requires_grad=True)
    code = triton_code(F.gelu, x)
    outputs, gradients = run(code, [x], [torch.ones(48, 64)])

The `call` function of each generated wrapper is executed unchanged, with its buffers on the CPU. A kernel's text is
executed once for each program of its grid. A block is a torch tensor, and `tl` has the few functions of Triton that
Inductor uses; a kernel that uses another one raises an AttributeError.

Every access is checked to lie inside its tensor. Buffers start as NaN, and so do masked lanes of a load that have no
other value, so that values which were never written show in the result. The interpreter does not see the order of sums
inside a block, fused multiply-adds, approximate functions and races between programs.
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

# Any power of two is correct. These are small, so that small tensors take several programs and several loops.
BLOCKS = {"XBLOCK": 8, "YBLOCK": 8, "ZBLOCK": 8, "R0_BLOCK": 16, "NUM_STAGES": 1}


def run(code: Code, tensors: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[list[Tensor], list[Any]]:
    """The outputs, and the gradients of the tensors (None for a tensor without a gradient).

    `tensors` are the inputs with which the code was generated, then a module's parameters and buffers. `tangents` are
    the gradients of the outputs.
    """
    primals = [tensors[number].detach() for number in code.arguments if number is not None]
    assert len(primals) == len(code.arguments), "symbolic sizes"
    results = call_graph(code.forward, primals)
    outputs, saved = results[: len(tangents)], results[len(tangents) :]
    gradients: list[Any] = [None] * len(tensors)
    if code.backward is not None:
        # AOTAutograd gives tangents the strides of their outputs.
        laid_out = [torch.empty_like(y).copy_(tangent) for y, tangent in zip(outputs, tangents, strict=True)]
        found = call_graph(code.backward, [*saved, *laid_out])
        for number, gradient in zip(code.arguments, found, strict=True):
            assert number is not None
            gradients[number] = gradient
    return outputs, gradients


def call_graph(graph: Graph, arguments: Sequence[Tensor]) -> list[Tensor]:
    """Runs the wrapper of a graph and returns its results."""
    (call,) = (
        node for node in ast.walk(ast.parse(graph.source)) if isinstance(node, ast.FunctionDef) and node.name == "call"
    )
    scope = {**_WRAPPER, **{kernel.name: _Launcher(kernel) for kernel in graph.kernels}}
    exec(compile(ast.Module([call], []), "<wrapper>", "exec"), scope)
    others = [None] * (len(call.args.args) - 1)  # `self`, if `call` is a method of the Runner
    return list(scope["call"](*others, list(arguments)))


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


_WRAPPER: dict[str, Any] = {
    "torch": _Torch(),
    "aten": torch.ops.aten,
    "extern_kernels": torch,
    "empty_strided_cuda": _empty,
    "reinterpret_tensor": _view,
    "assert_size_stride": _assert_size_stride,
    "assert_size_stride_grouped": _assert_sizes_strides,
    "assert_alignment": lambda *_: None,
    "copy_if_misaligned": lambda tensor: tensor,
    "copy_misaligned": lambda tensor: tensor,
    "get_raw_stream": lambda index: None,
}


# Kernels.


class _Launcher:
    """A kernel with its block sizes and its grid."""

    def __init__(self, kernel: Kernel) -> None:
        body = kernel.definition[kernel.definition.index("@triton.jit") :]
        self._program = compile(
            ast.fix_missing_locations(_NoChangeInPlace().visit(ast.parse(body))), "<kernel>", "exec"
        )
        self._name = kernel.name
        (signature,) = re.findall(r"'signature': (\{.*?\})", kernel.definition)
        kinds = ast.literal_eval(signature)
        self._parameters = [name for name in kinds if not name.isupper()]
        self._blocks = {name: BLOCKS[name] for name in kinds if name in BLOCKS}
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
        grid = [-(-arguments.get(f"{axis}numel", 1) // self._steps[axis]) for axis in "xyz"]
        given = {name: _Pointer(v, name) if isinstance(v, Tensor) else v for name, v in arguments.items()}
        for place in itertools.product(*map(range, grid)):
            scope = {"tl": _Language(place, grid), **_KERNEL}
            exec(self._program, scope)
            scope[self._name](**given, **self._blocks)


class _NoChangeInPlace(ast.NodeTransformer):
    """Turns x += 1 into x = x + 1, its meaning in Triton; x += 1 would change a torch tensor in place."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.Assign:
        assert isinstance(node.target, ast.Name)
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)


@dataclass(frozen=True)
class _Pointer:
    """Positions in a tensor's memory, counted from its first element."""

    tensor: Tensor
    name: str
    offset: Any = 0

    def __add__(self, offset: Any) -> _Pointer:
        return _Pointer(self.tensor, self.name, self.offset + offset)

    def places(self, mask: Any, beyond: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The tensor's elements in memory, positions among them, and which of the positions are accessed.

        With `beyond`, a single position may lie after the tensor's end; it is then not accessed.
        """
        tensor = self.tensor
        count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = tensor.as_strided((count,), (1,), tensor.storage_offset())
        offset = torch.as_tensor(self.offset, dtype=torch.int64)
        meant = torch.as_tensor(True if mask is None else mask)
        offset, meant = torch.broadcast_tensors(offset, meant)
        outside = meant & ((offset < 0) | (offset >= count))
        if beyond and offset.numel() == 1 and (offset >= count).all():
            return memory, offset, meant & ~outside
        assert not outside.any(), f"{self.name} has {count} elements, and {offset[outside].tolist()} are meant"
        return memory, offset, meant


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
        memory, offset, meant = pointer.places(mask, beyond=True)
        values = memory[torch.where(meant, offset, 0)]
        undefined = math.nan if values.is_floating_point() else -1
        return torch.where(meant, values, torch.as_tensor(undefined if other is None else other).to(values.dtype))

    @staticmethod
    def store(pointer: _Pointer, value: Any, mask: Any = None) -> None:
        memory, offset, meant = pointer.places(mask)
        shape = torch.broadcast_shapes(offset.shape, value.shape)
        values, offset, meant = (each.expand(shape) for each in (value, offset, meant))
        memory[offset[meant]] = values[meant].to(memory.dtype)

    @staticmethod
    def range(*limits: Any, num_stages: int = 1) -> Iterator[int]:
        return iter(range(*map(int, limits)))

    @staticmethod
    def arange(start: int, end: int) -> Tensor:
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
