"""The Triton kernels that Inductor would generate for an H100, on a machine without one. They are not executed.

    from tests.h100 import triton_code

    x = torch.empty(4096, 3072, device="meta", requires_grad=True)
    code = triton_code(F.gelu, x)
    (kernel,) = code.backward.kernels
    assert kernel.kind == "pointwise"
    assert [(a.loads, a.stores) for a in kernel.whole] == [(1, 0), (1, 0), (0, 1)]

`triton_code` compiles a function for its inputs as `torch.compile` does, forward and backward. Dynamo, AOTAutograd with
its partitioner, and Inductor's passes, lowerings, scheduler and code generation run unchanged, on FakeTensors whose
device is `cuda`. `h100()` replaces only the parts that would touch the device: the properties of the device, and the
step that loads the generated module. `code.forward` and `code.backward` hold the source (`.source`), the kernels in the
order of their launches (`.kernels`) and the calls of libraries such as cuBLAS (`.externs`). `print(code)` shows it all.

Every tensor that the function uses must be one of its inputs, or a parameter or buffer of the module that is called.
Only sizes, strides, dtypes and `requires_grad` of the inputs count, so they may be on `meta` and take no memory.

Triton need not be installed: the source is the same with it and without. Limits:
- Padding of matrix multiplications is off, since Inductor decides it by timing. `max_autotune` would time as well.
- PyTorch's C++ code sees CPU tensors. So scaled_dot_product_attention picks the CPU's kernel, and autocast would do
  nothing; it is an error here. Pass half-precision inputs instead.
- A tensor that the function makes without naming a device is on the GPU; with a real GPU it would be an error.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from ortho_fx import torch_private

_private = torch_private.load(torch_private.GPU_CODE)
_compiler = torch_private.load(torch_private.TESTS)
_PATHS = {entry.name: entry.path for entry in torch_private.GPU_CODE.names}
# Inductor's GraphLowering.
_Graph = Any

# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#features-and-technical-specifications, compute capability 9.0,
# with the 132 multiprocessors of the SXM5 card.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    is_integrated=False,
    gcnArchName="",
)

# Inductor's settings. It would decide padding by timing.
SETTINGS = {"shape_padding": False, "compile_threads": 1, "size_asserts": True}


@dataclass(frozen=True)
class Argument:
    """One tensor argument of a kernel launch, and how often the kernel's text loads from it and stores to it.

    A reduction with two loops over its input loads it twice.
    """

    parameter: str
    buffer: str
    dtype: torch.dtype
    numel: int
    loads: int
    stores: int


@dataclass(frozen=True)
class Kernel:
    """One launch of a generated kernel.

    `kind` is the name of its heuristics ("pointwise", "reduction", "persistent_reduction"...); these choose block sizes
    by `size_hints`. `numels` are the elements along each axis of the launch, `reductions` is the number of reductions
    in the text, and `definition` is the text with its decorators. `whole` holds the arguments with at least
    `whole_numel` elements.
    """

    name: str
    kind: str
    size_hints: dict[str, int]
    numels: dict[str, int]
    arguments: tuple[Argument, ...]
    reductions: int
    definition: str
    whole_numel: int

    @property
    def whole(self) -> tuple[Argument, ...]:
        return tuple(a for a in self.arguments if a.numel >= self.whole_numel)

    @property
    def loads(self) -> int:
        """Loads of whole tensors."""
        return sum(a.loads for a in self.whole)

    @property
    def stores(self) -> int:
        """Stores of whole tensors."""
        return sum(a.stores for a in self.whole)

    def __str__(self) -> str:
        axes = ", ".join(f"{axis} {numel}" for axis, numel in self.numels.items())
        lines = [f"{self.name}: {self.kind} ({axes}), {self.reductions} reductions"]
        for a in self.arguments:
            size = "whole" if a in self.whole else "small"
            lines.append(
                f"  {a.parameter} = {a.buffer}: {size} {a.numel} {a.dtype}, {a.loads} loads, {a.stores} stores"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Graph:
    """The code of one graph: the wrapper's source, its kernels in the order of their launches, and library calls."""

    source: str
    kernels: tuple[Kernel, ...]
    externs: tuple[str, ...]

    @property
    def big(self) -> tuple[Kernel, ...]:
        """The kernels that touch a whole tensor."""
        return tuple(kernel for kernel in self.kernels if kernel.whole)

    @property
    def small(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if not kernel.whole)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.kernels), *(f"library: {name}" for name in self.externs)])


@dataclass(frozen=True)
class Code:
    """The code of a function; without a backward if no input requires a gradient.

    `arguments` gives for each argument of the forward graph the number of its tensor, and None for other arguments.
    Numbers count the inputs, then a module's parameters and buffers. `sizes` gives for each argument that is a symbolic
    size an argument that has it, and the dimension.
    """

    forward: Graph
    backward: Graph | None
    arguments: tuple[int | None, ...]
    sizes: dict[int, tuple[int, int]]

    def __str__(self) -> str:
        return f"forward\n{self.forward}" + (f"\nbackward\n{self.backward}" if self.backward else "")


def triton_code(
    function: Callable[..., Any],
    *inputs: Any,
    whole: int | None = None,
    dynamic: bool = False,
    options: dict[str, Any] | None = None,
) -> Code:
    """The code that `torch.compile(function, dynamic=dynamic, options=options)` would run on an H100 for `inputs`.

    A tensor counts as whole if it has at least `whole` elements, by default those of the first input.
    Errors are those of the compiler.
    """
    if whole is None:
        whole = next(t.numel() for t in inputs if isinstance(t, Tensor))
    graphs: dict[bool, Graph] = {}

    def keep(graph: _Graph, wrapper: Any) -> Any:
        assert graph.is_backward not in graphs, "more than one graph"
        devices = {buffer.get_name(): buffer.get_device() for buffer in graph.buffers}
        elsewhere = [name for name, device in devices.items() if device is not None and device.type != "cuda"]
        assert not elsewhere, f"computed on the CPU: {elsewhere}"
        graphs[graph.is_backward] = _parse(wrapper.value, graph, whole)
        return SimpleNamespace(call=None, __file__="<not written>")

    def backend(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        called = (getattr(node.target, "__name__", "") for node in graph_module.graph.nodes)
        if torch.is_autocast_enabled("cuda") or "_enter_autocast" in called:
            raise NotImplementedError("autocast: pass inputs of the dtypes that it would cast to")
        placeholders = (node for node in graph_module.graph.nodes if node.op == "placeholder")
        sizes.update(_places_of_sizes([node.meta["example_value"] for node in placeholders]))
        _compiler.compile_fx(graph_module, example_inputs, config_patches={**SETTINGS, **(options or {})})

        def run(*called: Any) -> Any:
            arguments.extend(numbers.get(id(each)) for each in called)
            return graph_module.forward(*called)

        return run

    arguments: list[int | None] = []
    sizes: dict[int, tuple[int, int]] = {}
    numbers: dict[int, int] = {}
    mode = _private.FakeTensorMode(shape_env=ShapeEnv())
    torch.compiler.reset()
    try:
        with h100(), mock.patch.object(_compiler.GraphLowering, "_compile_to_module_lines", keep), mode:
            fakes = [_fake(t) if isinstance(t, Tensor) else t for t in inputs]
            tensors: list[Tensor] = [fake for fake in fakes if isinstance(fake, Tensor)]
            if isinstance(function, nn.Module):
                function = _on_device(function)
                tensors += [*function.parameters(), *function.buffers()]
            numbers.update((id(tensor), number) for number, tensor in enumerate(tensors))
            torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*fakes)
    finally:
        # Dynamo's cached code for the function is guarded on fake tensors and returns them.
        torch.compiler.reset()
    return Code(graphs[False], graphs.get(True), tuple(arguments), sizes)


def _places_of_sizes(inputs: Sequence[Any]) -> dict[int, tuple[int, int]]:
    """For each input that is a symbolic size, an input that is a tensor with this size, and the dimension."""
    found = {
        str(size): (number, dim)
        for number, tensor in enumerate(inputs)
        if isinstance(tensor, Tensor)
        for dim, size in enumerate(tensor.shape)
    }
    return {number: found[str(size)] for number, size in enumerate(inputs) if isinstance(size, torch.SymInt)}


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda")
    return fake.requires_grad_(tensor.requires_grad)


def _on_device(module: nn.Module) -> nn.Module:
    """A copy of the module whose parameters and buffers are fake; called inside a FakeTensorMode."""
    fakes: dict[int, Any] = {}
    for tensor in module.parameters():
        fakes[id(tensor)] = nn.Parameter(_fake(tensor), tensor.requires_grad)
    for tensor in module.buffers():
        fakes[id(tensor)] = _fake(tensor)
    return copy.deepcopy(module, fakes)


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """In the block, device 0 looks like an H100 to PyTorch's Python code, and Triton seems to work to Inductor."""
    with contextlib.ExitStack() as stack:

        def replace(target: Any, **values: Any) -> None:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(target, name, value, create=True))

        def replace_private(**values: Any) -> None:
            for name, value in values.items():
                stack.enter_context(mock.patch(_PATHS[name], value))

        # The cache may hold the properties of a real device, and it must not keep these.
        _private.DeviceProperties.create.cache_clear()
        stack.callback(_private.DeviceProperties.create.cache_clear)

        device = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_properties": lambda device=None: PROPERTIES,
        }
        replace(
            torch.cuda,
            **device,
            get_device_capability=lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
            get_device_name=lambda device=None: PROPERTIES.name,
            is_bf16_supported=lambda including_emulation=True: True,
            get_rng_state=lambda device=None: torch.empty(0),
            set_rng_state=lambda state, device=None: None,
            synchronize=lambda device=None: None,
            set_device=lambda device: None,
            is_current_stream_capturing=lambda: False,
        )
        replace_private(_exchange_device=lambda device: 0, _maybe_exchange_device=lambda device: 0)
        # No accelerator, as in a PyTorch without CUDA: Dynamo would ask it for its stream, which no kernel needs.
        replace(
            torch.accelerator,
            current_accelerator=lambda check_available=False: None,
            device_count=lambda: 0,
            is_available=lambda: False,
        )
        cuda = _private.CudaInterface
        replace(
            cuda,
            **{name: staticmethod(function) for name, function in device.items()},
            is_bf16_supported=staticmethod(lambda including_emulation=True: True),
            synchronize=staticmethod(lambda device=None: None),
            raise_if_triton_unavailable=staticmethod(lambda device=None: None),
        )
        replace(
            cuda.Worker,
            current_device=staticmethod(lambda: 0),
            get_device_properties=staticmethod(lambda device=None: PROPERTIES),
        )

        # Questions that Inductor asks Triton in code generation. The answers are those of the Triton version that
        # belongs to this PyTorch, so they do not depend on an installed one.
        replace_private(
            has_triton=lambda: True,
            get_triton_attrs_descriptor_version=lambda: _private.TritonAttrsDescriptorVersion.V4_DICT,
            AttrsDescriptorWrapper=_attributes,
            triton_hash_with_backend=lambda: "H100",
        )

        _hide_device_from_autograd(replace, replace_private)
        fold = _private._deduce_value

        def fold_on_cpu(self: Any, node: torch.fx.Node) -> Any:
            with _OnCPU():
                return fold(self, node)

        replace_private(_deduce_value=fold_on_cpu)
        stack.enter_context(warnings.catch_warnings())
        # Advice to users of a GPU with tensor cores.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        # A note that no cache is used.
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        stack.enter_context(torch.compiler.config.patch(force_disable_caches=True))
        stack.enter_context(_compiler.functorch.patch(force_non_lazy_backward_lowering=True))
        yield


class _OnCPU(TorchFunctionMode):
    """Runs Inductor's own computations with constants on the CPU instead of the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def to_cpu(value: Any) -> Any:
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

        return func(*map(to_cpu, args), **{name: to_cpu(value) for name, value in (kwargs or {}).items()})


def _attributes(
    divisible_by_16: Sequence[int] = (), equal_to_1: Sequence[int] = (), pointer_range_32: Sequence[int] = ()
) -> dict[tuple[int], list[list[Any]]]:
    assert not pointer_range_32
    return {(index,): [["tt.divisibility", 16]] for index in divisible_by_16}


def _hide_device_from_autograd(replace: Callable[..., None], replace_private: Callable[..., None]) -> None:
    """Makes tensors on `cuda` look like CPU tensors to PyTorch's C++ code, and no tensor like one to Python code.

    In a build without CUDA, autograd's engine fails on a device that it has no streams of; it asks the C++ object for
    the device. Python code decides what is compiled; it asks the attributes that are replaced here. Operators that C++
    code calls internally name the CPU, as in `type_as`, which calls `to`; the tracing modes correct that.
    """
    cpu, prim_device = torch.device("cpu"), torch.ops.prim.device.default
    is_cuda = property(lambda tensor: tensor.device.type == "cuda")

    functional, fake = _private.FunctionalTensor, _private.FakeTensor
    make_wrapper = _private._make_wrapper_subclass

    def make_wrapper_on_cpu(cls: type, *arguments: Any, **settings: Any) -> Tensor:
        if cls is functional:
            arguments = tuple(cpu if isinstance(a, torch.device) else a for a in arguments)
        return make_wrapper(cls, *arguments, **settings)

    replace_private(_make_wrapper_subclass=staticmethod(make_wrapper_on_cpu))
    replace(
        functional,
        device=property(lambda tensor: _private._from_functional_tensor(tensor.elem).device),
        is_cuda=is_cuda,
    )

    handlers = _private._DISPATCH_META_HANDLERS
    device_of = handlers[prim_device]
    dispatch_fake = fake.__torch_dispatch__

    def device_for_cpp(arguments: Sequence[Any]) -> torch.device:
        device = device_of(arguments)
        return cpu if device.type == "cuda" else device

    def dispatch_device(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return device_for_cpp(args) if func is prim_device else dispatch_fake(func, types, args, kwargs or {})

    replace_private(_DISPATCH_META_HANDLERS={**handlers, prim_device: device_for_cpp})
    replace(fake, __torch_dispatch__=classmethod(dispatch_device), is_cuda=is_cuda)

    for mode in (_private.FunctionalTensorMode, ProxyTorchDispatchMode, _private.FakeTensorMode):

        def on_cuda(
            self: Any,
            func: Any,
            types: Any,
            args: Any = (),
            kwargs: Any = None,
            dispatch: Any = mode.__torch_dispatch__,
        ) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") == cpu:
                kwargs["device"] = torch.device("cuda", 0)
            return dispatch(self, func, types, args, kwargs)

        replace(mode, __torch_dispatch__=on_cuda)
    # Makes constants on the CPU, as in a process that must not initialise CUDA.
    replace(_private.FakeTensorMode, avoid_device_init=property(lambda mode: True))


_DEFINITION = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", re.MULTILINE | re.DOTALL)
_LAUNCH = re.compile(r"^ +(\w+)\.run\((.*), stream=\w+\)$")
_LIBRARY_CALL = re.compile(r"^ +(?:\w+ = )?((?:extern_kernels|aten|torch\.ops\.\w+)\.[\w.]+)\(")
_WORKSPACE = re.compile(r"^ +(workspace_\d+) = empty_strided_cuda\(\(([^)]*)\), .*, torch\.(\w+)\)")
_REUSED = re.compile(r"^ +(workspace_\d+) = (workspace_\d+);")
_IN_PLACE_OF = re.compile(r"^ +(workspace_\d+) = reinterpret_tensor\((\w+), \(([^)]*)\)")
_SIZE = re.compile(r"^ +(\w*numel) = (.*)$")


def _parse(source: str, graph: _Graph, whole: int) -> Graph:
    """Reads the launches from a wrapper's source; `graph` knows its buffers."""
    definitions = dict(_DEFINITION.findall(source))
    kernels, externs = [], []
    # Buffers between kernels that the graph does not know, with their elements and dtype.
    workspaces: dict[str, tuple[int, torch.dtype]] = {}
    sizes = {str(symbol): int(value) for symbol, value in graph.sizevars.shape_env.backed_var_to_val.items()}
    for line in source[source.index("\nclass Runner") :].splitlines():
        if match := _LAUNCH.match(line):
            kernels.append(_kernel(match[1], definitions[match[1]], _split(match[2]), graph, workspaces, sizes, whole))
        elif match := _WORKSPACE.match(line):
            numel = math.prod(_evaluate(size, sizes) for size in _split(match[2]))
            workspaces[match[1]] = numel, getattr(torch, match[3])
        elif match := _REUSED.match(line):
            workspaces[match[1]] = workspaces[match[2]]
        elif match := _IN_PLACE_OF.match(line):
            numel = math.prod(_evaluate(size, sizes) for size in _split(match[3]))
            workspaces[match[1]] = numel, graph.get_dtype(match[2])
        elif match := _LIBRARY_CALL.match(line):
            externs.append(match[1])
        elif match := _SIZE.match(line):
            sizes[match[1]] = _evaluate(match[2], sizes)
    assert {kernel.name for kernel in kernels} == set(definitions), "a kernel is defined and no launch of it was found"
    return Graph(source, tuple(kernels), tuple(externs))


def _kernel(
    name: str,
    definition: str,
    values: list[str],
    graph: _Graph,
    workspaces: dict[str, tuple[int, torch.dtype]],
    sizes: dict[str, int],
    whole: int,
) -> Kernel:
    header = re.search(r"@triton_heuristics\.(\w+)\(\s*size_hints=(\{.*?\})", definition)
    signature = re.search(r"'signature': (\{.*?\})", definition)
    reductions = re.search(r"'num_reduction': (\d+)", definition)
    assert header is not None, definition
    assert signature is not None, definition
    assert reductions is not None, definition
    # Settings of the kernel, such as XBLOCK, are chosen at its launch; the wrapper does not pass them.
    parameters = [name for name in ast.literal_eval(signature[1]) if not name.isupper()]
    body = definition[definition.index("@triton.jit") :]
    arguments, numels = [], {}
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.endswith("numel"):
            numels[parameter.removesuffix("numel")] = _evaluate(value, sizes)
        elif "ptr" in parameter:
            view = re.match(r"reinterpret_tensor\((\w+), \(([^)]*)\)", value)
            buffer = view[1] if view else value
            numel = math.prod(_evaluate(size, sizes) for size in _split(view[2])) if view else None
            if buffer in workspaces:
                elements, dtype = workspaces[buffer]
            else:
                elements, dtype = _evaluate(str(graph.get_numel(buffer)), sizes), graph.get_dtype(buffer)
            loads, stores = (len(re.findall(rf"tl\.{verb}\({parameter}\b", body)) for verb in ("load", "store"))
            arguments.append(Argument(parameter, buffer, dtype, elements if numel is None else numel, loads, stores))
    hints = ast.literal_eval(header[2])
    return Kernel(name, header[1], hints, numels, tuple(arguments), int(reductions[1]), definition, whole)


def _split(arguments: str) -> list[str]:
    """The arguments of a call, split at the commas that are not inside parentheses."""
    parts = re.findall(r"(?:[^,()]|\((?:[^()]|\([^()]*\))*\))+", arguments)
    return [part.strip() for part in parts if part.strip()]


def _evaluate(expression: str, sizes: dict[str, int]) -> int:
    """The value of a wrapper's expression for the sizes of the example inputs."""
    return int(eval(expression, {"__builtins__": {}}, sizes))
