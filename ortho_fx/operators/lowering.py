"""Lowers the operators in Inductor: the formulas of the bases run on values of the kernel that it generates.

This module is imported when the first operator is traced under Dynamo, never by `import ortho_fx`. From then on, a
trace for Inductor (and no other backend) replaces each operator by a twin in the namespace `ortho_fx_inductor`. The
twin stays in the graph until it is lowered here:

- The forward is one pointwise node, which fuses with the operations around it. AOTAutograd's partitioner may recompute
  it, like any pointwise operator, so the backward pass saves only the input.
- The backward sees its tensors as [before, groups, behind] in the order of memory. The input gradient is one pointwise
  node. Each term of the parameters' gradients is a reduction of chunks whose size divides the tensor exactly. So all of
  them fuse into one kernel, which reads the input and the incoming gradient once. One small reduction sums the chunks.

If Inductor raises any error while it compiles a graph with twins, the graph is compiled again with the twins in plain
tensor operations. The callback `lose` of `install` then gets each basis and the error.

All names of PyTorch used here are private; they come from `torch_private.INDUCTOR`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ortho_fx import torch_private
from ortho_fx.bases import BASES, Basis, tropical
from ortho_fx.operators import decomposition as plain
from ortho_fx.operators import parts
from ortho_fx.operators.values import Value

NAMESPACE = "ortho_fx_inductor"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_inductor = torch_private.load(torch_private.INDUCTOR)
_ops = _inductor.ops
_ComputedBuffer: Any = _inductor.ComputedBuffer
# A tensor in a graph that Inductor lowers.
_Box = Any


_FMA = _inductor.pointwise_overrides_data.get("fma")


class _Numbers:
    """The numbers of one kernel in one trace of it: loads them, and has the operations of `Value`.

    The same operation on the same operands is done once. Inductor would find this out as well, but only after it has
    gone through every operation several times, and that is most of the time of a compilation.

    Args:
        dtype: in which the kernel computes.
        device: on which it runs. The compilers of GPUs make one operation of a product and a sum by themselves. That of
            a CPU is told not to, so `fused` says that `fma` is wanted.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._known = dtype, dict[Any, tuple[Any, Any]]()
        self.fused = device.type == "cpu" and _FMA is not None and _FMA.cppvec is not None

    def load(self, tensor: _Box, index: Sequence[sympy.Expr]) -> Value:
        value = self._once(("load", id(tensor), *index), lambda: tensor.make_loader()(index), tensor)
        return self._value(value, tensor.get_dtype())

    def place(self, index: Any) -> Value:
        """An index as a number."""
        index = sympy.sympify(index)
        return self._value(self._once(("index_expr", index), lambda: _ops.index_expr(index, torch.int64)), torch.int64)

    def where(self, condition: Any, value: Any, other: Any, dtype: torch.dtype) -> Any:
        return self._called("where", condition, value, other)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._called, name)

    def _called(self, name: str, *operands: Any) -> Any:
        plain = (float, int, torch.dtype)
        key = (name, *(repr(operand) if isinstance(operand, plain) else id(operand) for operand in operands))
        return self._once(key, lambda: getattr(_ops, name)(*operands), operands)

    def _once(self, key: Any, compute: Callable[[], Any], kept: Any = None) -> Any:
        """What was computed under this key; `kept` are the objects whose identity is in the key."""
        if key not in self._known:
            self._known[key] = compute(), kept
        return self._known[key][0]

    def _value(self, value: Any, dtype: torch.dtype) -> Value:
        return Value(value if dtype == self._dtype else self.to_dtype(value, self._dtype), self._dtype, self)


class _Parameter:
    """A parameter of the current expansion: its numbers as values of the kernel."""

    def __init__(self, tensor: _Box, numbers: _Numbers, group: sympy.Expr | None) -> None:
        self._tensor, self._numbers = tensor, numbers
        self._group = [] if group is None else [group]

    def __len__(self) -> int:
        return int(self._tensor.get_size()[0])

    def __getitem__(self, k: int) -> Value:
        return self._numbers.load(self._tensor, [sympy.Integer(k), *self._group])


def _lowered_forward(basis: Basis) -> Callable[..., _Box]:
    count = len(basis.parameters)

    def lower(x: _Box, *rest: Any) -> _Box:
        parameters, channel_dim = rest[:count], rest[count]
        dtype, size = parts.compute_dtype(x.get_dtype()), x.get_size()
        for parameter in parameters:
            parameter.realize()
        groups = parameters[0].get_size()[1] if len(parameters[0].get_size()) > 1 else None
        if groups is not None and groups != size[channel_dim] and x.get_device().type == "cpu":
            groups = size[channel_dim]
            parameters = tuple(_of_channels(parameter, groups) for parameter in parameters)

        def inner(index: Sequence[sympy.Expr]) -> Any:
            group = None
            if groups is not None:
                group = index[channel_dim] // (size[channel_dim] // groups)
            numbers = _Numbers(dtype, x.get_device_or_error())
            values = [_Parameter(parameter, numbers, group) for parameter in parameters]
            y = basis.evaluate(numbers.load(x, index), *values)
            if x.get_dtype() == torch.float16:
                largest = torch.finfo(torch.float16).max
                y = y.minimum(largest).maximum(-largest)
            return _ops.to_dtype(y.value, x.get_dtype())

        return _inductor.Pointwise.create(device=x.get_device(), dtype=x.get_dtype(), inner_fn=inner, ranges=size)

    return lower


# Up to so many lines, each row of a maximum's bends is computed from all lines; above, in stages through memory.
_FEW_LINES = 9


def _lowered_prepare(basis: Basis) -> Callable[..., _Box]:
    """`tropical.bends` of each maximum: [maximum, slopes or offsets or numbers of lines, row, ...groups]."""

    def lower(*arguments: Any) -> _Box:
        parameters, dtype = arguments[:-1], arguments[-1]
        device, size = parameters[0].get_device_or_error(), parameters[0].get_size()
        for parameter in parameters:
            parameter.realize()
        pairs = [[parameters[at] for at in pair] for pair in basis.maxima]
        count, behind = int(size[0]), size[1:]

        def buffer(before: Sequence[int], compute: Callable[[_Maximum, Sequence[Any]], Value]) -> _Box:
            """A tensor [maximum, ...before, row, ...groups], from `compute(a maximum, [...before, row])`."""

            def inner(index: Sequence[Any]) -> Any:
                maximum = _Maximum(_Numbers(dtype, device), pairs, count, index[0], index[len(before) + 2 :])
                return compute(maximum, index[1 : len(before) + 2]).value

            ranges = [sympy.Integer(size) for size in (len(pairs), *before, count)]
            box = _inductor.Pointwise.create(device=device, dtype=dtype, inner_fn=inner, ranges=[*ranges, *behind])
            box.realize()
            return box

        if count > _FEW_LINES:
            starts = buffer((), lambda maximum, at: maximum.start(at[0]))
            places = buffer((), lambda maximum, at: maximum.place(at[0], starts))

        def row(maximum: _Maximum, at: Sequence[Any]) -> Value:
            if count > _FEW_LINES:
                found = maximum.rows(starts), maximum.rows(places)
            else:
                found = tropical.starts_and_places(maximum.lines)
            *others, last = tropical.bend_at(maximum.numbers.place(at[1]), maximum.lines, *found)
            for kind, value in enumerate(others):
                last = maximum.numbers.place(at[0]).equals(float(kind)).where(value, last)
            return last

        return buffer((3,), row)

    return lower


class _Maximum:
    """The maximum number `which` of a basis in a trace of a kernel: its lines as numbers, for a group of channels."""

    def __init__(
        self, numbers: _Numbers, pairs: Sequence[Sequence[_Box]], count: int, which: Any, column: Sequence[Any]
    ) -> None:
        self.numbers, self._pairs, self._count, self._which, self._column = numbers, pairs, count, which, column

    @functools.cached_property
    def lines(self) -> list[tropical.Line]:
        return [self._line(k) for k in range(self._count)]

    def _line(self, k: Any) -> tropical.Line:
        index = [sympy.sympify(k), *self._column]
        *others, last = ([self.numbers.load(tensor, index) for tensor in pair] for pair in self._pairs)
        for number, pair in enumerate(others):
            here = self.numbers.place(self._which).equals(float(number))
            last = [here.where(value, other) for value, other in zip(pair, last, strict=True)]
        return last[0], last[1]

    def start(self, k: Any) -> Value:
        return tropical.start_of(self._line(k), self.numbers.place(k), self.lines)

    def place(self, k: Any, starts: _Box) -> Value:
        start = self.numbers.load(starts, [self._which, k, *self._column])
        return tropical.place_of(self._line(k), start, self.lines, self.rows(starts))

    def rows(self, tensor: _Box) -> list[Value]:
        """The rows of a tensor of `buffer`."""
        return [self.numbers.load(tensor, [self._which, sympy.Integer(k), *self._column]) for k in range(self._count)]


def _of_channels(parameter: _Box, channels: sympy.Expr) -> _Box:
    """A parameter with a column for each channel: a CPU reads neighbouring columns at once, and gathers others."""
    load, (terms, groups) = parameter.make_loader(), parameter.get_size()
    box = _inductor.Pointwise.create(
        device=parameter.get_device(),
        dtype=parameter.get_dtype(),
        inner_fn=lambda index: load([index[0], index[1] // (channels // groups)]),
        ranges=[terms, channels],
    )
    box.realize()
    return box


def _lowered_backward(basis: Basis) -> Callable[..., tuple[_Box, _Box]]:
    def lower(tensors: Sequence[_Box], *parameters: _Box) -> tuple[_Box, _Box]:
        grad, x = tensors
        device, out_dtype = x.get_device_or_error(), x.get_dtype()
        dtype = parts.compute_dtype(out_dtype)
        before, groups, behind = map(sympy.sympify, x.get_size())
        for parameter in parameters:
            parameter.realize()
        for tensor in tensors:
            tensor.mark_reuse(2)
        count = _count_terms(basis, parameters)
        grouped = len(parameters[0].get_size()) > 1

        def derivatives(index: Sequence[sympy.Expr]) -> tuple[Any, list[Any]]:
            numbers = _Numbers(dtype, device)
            values = [_Parameter(parameter, numbers, index[1] if grouped else None) for parameter in parameters]
            return basis.derivatives(numbers.load(grad, index), numbers.load(x, index), *values)

        def grad_x(index: Sequence[sympy.Expr]) -> Any:
            return _ops.to_dtype(derivatives(index)[0]().value, out_dtype)

        rows, across = _chunk(device, before, groups, behind, count)
        chunks, pieces = before // rows, behind // across
        outer, inner = [chunks, groups, pieces], [rows, across]

        def place(index: Sequence[sympy.Expr], within: Sequence[sympy.Expr]) -> list[sympy.Expr]:
            chunk, group, part = index
            row, column = within
            return [chunk * rows + row, group, part * across + column]

        reduction = functools.partial(_sum, device, dtype, _hint(grouped and behind == 1, across, count))

        # The input gradient comes first, so that the scheduler fuses the reductions into it.
        nest = _inductor.Pointwise.create(
            device=device,
            dtype=out_dtype,
            inner_fn=lambda index: grad_x(place(index[:3], index[3:])),
            ranges=[*outer, *inner],
        )
        strides = [rows * groups * behind, behind, across, groups * behind, sympy.Integer(1)]
        result = _as_written(nest, strides)

        def partial(k: int) -> _Box:
            def term(index: Sequence[sympy.Expr], within: Sequence[sympy.Expr]) -> Any:
                return derivatives(place(index[1:], within))[1][k]().value

            box = reduction(term, [sympy.Integer(1), *outer], inner)
            _as_written(box)
            return box

        joined = _inductor.TensorBox(_inductor.ConcatKernel.create([partial(k) for k in range(count)], 0))
        load = joined.make_loader()
        sums = reduction(
            lambda index, within: load([index[0], within[0], index[1], within[1]]),
            [sympy.Integer(count), groups],
            [chunks, pieces],
        )
        sums.realize()
        layout = _inductor.FixedLayout(device, out_dtype, [before, groups, behind])
        return _inductor.TensorBox(_inductor.ReinterpretView(data=result, layout=layout)), sums

    return lower


def _hint(column: bool, across: sympy.Expr, terms: int) -> Any:
    """What a GPU's blocks look like: one row, some neighbouring columns, or what is the fastest of several.

    With several, Inductor times them at the first launch, and leaves out those that spill registers. One of them has a
    quarter of the usual elements in a thread.
    """
    hints = _inductor.ReductionHint
    if across != 1:
        return hints.INNER
    fits = parts.loop_registers(terms, column) <= parts.MOST_REGISTERS
    return hints.OUTER if fits else hints.DEFAULT


def _sum(
    device: torch.device,
    dtype: torch.dtype,
    hint: Any,
    inner_fn: Callable[..., Any],
    ranges: list[sympy.Expr],
    reduced: list[sympy.Expr],
) -> _Box:
    if sympy.prod(reduced) == 1:
        zeros = [sympy.Integer(0) for _ in reduced]
        return _inductor.Pointwise.create(
            device=device, dtype=dtype, inner_fn=lambda index: inner_fn(index, zeros), ranges=ranges
        )
    # Not Reduction.create: it would split the reduction again, into chunks that may not divide the tensor.
    return _inductor.TensorBox.create(
        _inductor.Reduction(
            device=device,
            dtype=dtype,
            inner_fn=inner_fn,
            ranges=ranges,
            reduction_ranges=reduced,
            reduction_type="sum",
            src_dtype=dtype,
            reduction_hint=hint,
        )
    )


class _AsWritten(_ComputedBuffer):
    """A buffer whose loops are neither merged nor reordered.

    The CPU backend fuses a pointwise node with a reduction only if all their loops are the same.
    """

    def simplify_and_reorder(self, *_: Any, **__: Any) -> Any:
        sizes, body, _ = self.get_default_sizes_body()
        # Traced again with loops of length one included, as for any other buffer: PyTorch 2.15 needs one variable for
        # each size.
        variables, ranges = _inductor.index_vars_no_squeeze(*sizes, prefix="p")
        return sizes, _inductor.LoopBody(body, variables, ranges, *variables)


def _as_written(box: _Box, strides: Sequence[sympy.Expr] | None = None) -> Any:
    """Makes a buffer of the box that keeps its loops, with the given strides if there are any."""
    box.realize()
    storage = box.data
    buffer = storage.data
    if buffer.get_device().type == "cpu":
        buffer.__class__ = _AsWritten
    if strides is not None:
        buffer.layout = _inductor.FixedLayout(buffer.get_device(), buffer.get_dtype(), buffer.get_size(), strides)
    return storage


def _chunk(
    device: torch.device, before: sympy.Expr, groups: sympy.Expr, behind: sympy.Expr, terms: int
) -> tuple[sympy.Expr, sympy.Expr]:
    """As `parts.chunk`, for sizes that may be symbolic: only known factors are used, and a whole row is a chunk."""
    numel = before * groups * behind
    limits = parts.largest_chunks(
        device.type, groups != 1, behind, terms, int(numel) if numel.is_number else float("inf")
    )
    for largest in limits:
        across = sympy.Integer(parts.largest_divisor(int(behind), largest)) if behind.is_number else behind
        if across != behind:
            rows = sympy.Integer(1)
        else:
            known = int(before.as_coeff_Mul()[0])
            rows = sympy.Integer(parts.largest_divisor(known, largest / int(across)) if across.is_number else 1)
            if rows == across == 1:
                # If no chunk divides a symbolic size, there would be as many partial sums as elements. So all rows are
                # one chunk.
                rows = before
        size = rows * across
        if not size.is_number or parts.makes_a_loop(int(size)):
            break
    return rows, across


def _count_terms(basis: Basis, parameters: Sequence[_Box]) -> int:
    learned = (p for p, described in zip(parameters, basis.parameters, strict=True) if described.learnable)
    return sum(int(parameter.get_size()[0]) for parameter in learned)


def register(basis: Basis, lowered: dict[str, Callable[..., Any]]) -> None:
    """Defines the twins of a basis' operators, and registers their lowering with Inductor.

    `lowered` gets the function that replaces each operator in a graph for Inductor, by the operator's name.
    """
    name = f"{basis.name}_backward"
    parameters = ", ".join(f"Tensor {parameter.name}" for parameter in basis.parameters)
    _LIBRARY.define(f"{basis.name}(Tensor x, {parameters}, int channel_dim) -> Tensor")
    # grad and x are a list: PyTorch 2.11 needs a list as the first argument of the node that makes a `ConcatKernel`.
    _LIBRARY.define(f"{name}(Tensor[] tensors, {parameters}) -> (Tensor, Tensor)")
    forward, backward = (getattr(getattr(torch.ops, NAMESPACE), twin) for twin in (basis.name, name))

    def run_forward(x: Tensor, *rest: Any) -> Tensor:
        return plain.forward(basis, x, *rest[:-1], channel_dim=rest[-1])

    def run_backward(tensors: Sequence[Tensor], *prepared: Tensor) -> tuple[Tensor, Tensor]:
        return plain.backward(basis, *tensors, *prepared)

    def backward_shapes(tensors: Sequence[Tensor], *prepared: Tensor) -> tuple[Tensor, Tensor]:
        _, x = tensors
        size = (parts.count_terms(basis, prepared), x.shape[1])
        sums = x.new_empty(size, dtype=parts.compute_dtype(x.dtype))
        return torch.empty_like(x, memory_format=torch.contiguous_format), sums

    def call_forward(x: Tensor, *prepared: Tensor, channel_dim: int) -> Tensor:
        return forward(x, *prepared, channel_dim)

    def call_backward(
        grad: Tensor, x: Tensor, *prepared: Tensor, finish: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        if parts.is_known(x.numel() == 0):
            return plain.backward(basis, grad, x, *prepared, finish=finish)
        grad_x, sums = backward([grad, x], *prepared)
        return finish(grad_x), sums

    for twin, run, shapes in (
        (basis.name, run_forward, lambda x, *_: torch.empty_like(x)),
        (name, run_backward, backward_shapes),
    ):
        _LIBRARY.impl(twin, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{twin}", shapes, lib=_LIBRARY)
    _inductor.register_lowering(forward.default, type_promotion_kind=None)(_lowered_forward(basis))
    _inductor.register_lowering(backward.default, type_promotion_kind=None)(_lowered_backward(basis))
    _inductor.pointwise_ops().extend((forward, backward))
    count = 1 + len(basis.parameters)
    PLAIN_TWINS[forward.default] = basis, lambda *a: plain.forward(basis, *a[:count], channel_dim=a[count])
    PLAIN_TWINS[backward.default] = basis, functools.partial(plain.backward, basis)
    if basis.maxima:
        _register_prepare(basis)
    decompositions = plain.decompositions(basis, call_forward, call_backward, prepare_of(basis))
    lowered.update(zip((basis.name, name), decompositions, strict=True))


def _register_prepare(basis: Basis) -> None:
    """Defines the twin of the preparation of a basis with maxima of lines, and registers its lowering."""
    name = f"{basis.name}_prepare"
    parameters = ", ".join(f"Tensor {parameter.name}" for parameter in basis.parameters)
    _LIBRARY.define(f"{name}({parameters}, ScalarType dtype) -> Tensor")

    def run(*arguments: Any) -> Tensor:
        *values, dtype = arguments
        pairs = [tropical.bends(*(values[at].to(dtype) for at in pair)) for pair in basis.maxima]
        return torch.stack([torch.stack([slopes, offsets, order.to(dtype)]) for slopes, offsets, order in pairs])

    def shapes(*arguments: Any) -> Tensor:
        *values, dtype = arguments
        return values[0].new_empty((len(basis.maxima), 3, *values[0].shape), dtype=dtype)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_LIBRARY)
    twin = getattr(getattr(torch.ops, NAMESPACE), name).default
    _inductor.register_lowering(twin, type_promotion_kind=None)(_lowered_prepare(basis))
    PLAIN_TWINS[twin] = basis, run


def prepare_of(basis: Basis) -> Callable[..., tuple[Tensor, ...]]:
    """What prepares the parameters of a basis in a graph for Inductor, as `Basis.prepare_for_kernels` does."""
    if not basis.maxima:
        return basis.prepare_for_kernels
    twin = getattr(getattr(torch.ops, NAMESPACE), f"{basis.name}_prepare").default

    def prepare(dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        prepared = twin(*parameters, dtype)
        bends = [prepared[which, kind] for which in range(len(basis.maxima)) for kind in range(2)]
        order = prepared[:, 2].movedim(0, 1) if len(basis.maxima) > 1 else prepared[0, 2]
        return *bends, order

    return prepare


# For each twin, its basis and its function in plain tensor operations.
PLAIN_TWINS: dict[Any, tuple[Basis, Callable[..., Any]]] = {}


def _guard(lose: Callable[[Basis, Exception], None]) -> None:
    """Makes Inductor compile a graph with twins a second time without them, if the first time raises.

    `lose` is called with each basis of the graph and the error.
    """
    compile_graph = _inductor.fx_codegen_and_compile
    module = sys.modules[compile_graph.__module__]

    @functools.wraps(compile_graph)
    def guarded(gm: fx.GraphModule, *arguments: Any, **settings: Any) -> Any:
        bases = {PLAIN_TWINS[node.target][0] for _, node in _twins(gm)}
        if not bases:
            return compile_graph(gm, *arguments, **settings)
        spare = _copy(gm)  # the compiler changes the graph
        try:
            with _horizontal_fusion(), _sums_of_one_order():
                return compile_graph(gm, *arguments, **settings)
        except Exception as error:
            try:
                for graph_module, node in list(_twins(spare)):
                    _expand(graph_module, node)
                compiled = compile_graph(spare, *arguments, **settings)
            except Exception:
                raise error from None
            for basis in bases:
                lose(basis, error)
            return compiled

    setattr(module, compile_graph.__name__, guarded)


def _horizontal_fusion() -> Any:
    """Lets a C++ kernel hold as many sums as a CPU has registers: PyTorch's default splits Hermite 16 into two kernels.

    A limit that the user has chosen stays.
    """
    if _inductor.config.cpp.max_horizontal_fusion_size != 16:
        return contextlib.nullcontext()
    return _inductor.config.patch({"cpp.max_horizontal_fusion_size": 32})


def _sums_of_one_order() -> Any:
    """Keeps our sums out of kernels that sum over both rows and columns, before PyTorch 2.15.

    Our sums share the buffer of `ConcatKernel`, and such a kernel does not write its sums into a shared buffer. The
    gradients would be uninitialised memory (pytorch issue 193061).
    """
    if torch_private.release() >= (2, 15):
        return contextlib.nullcontext()
    return _inductor.config.patch({"triton.mix_order_reduction": False})


def _twins(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Node]]:
    """The twins in a graph and in the graphs inside it, each with its graph."""
    for graph_module in gm.modules():
        if isinstance(graph_module, fx.GraphModule):
            for node in graph_module.graph.nodes:
                if node.op == "call_function" and node.target in PLAIN_TWINS:
                    yield graph_module, node


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph and of the graphs inside it, with the same tensors."""
    copied: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, copied)
    graph.output(output)
    twin = fx.GraphModule(gm, graph)
    twin.meta.update(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(twin, name, _copy(child))
    return twin


def _expand(gm: fx.GraphModule, node: fx.Node) -> None:
    """Replaces a twin by plain tensor operations."""
    _, function = PLAIN_TWINS[node.target]
    arguments = [each for given in node.args for each in (given if isinstance(given, list) else [given])]
    nodes = [argument for argument in arguments if isinstance(argument, fx.Node)]
    numbers = [argument for argument in arguments if not isinstance(argument, fx.Node)]
    values = [argument.meta["val"] for argument in nodes]
    with values[0].fake_mode:
        traced = _inductor.make_fx(
            lambda *tensors: function(*tensors, *numbers), decomposition_table=_inductor.decompositions
        )(*values)
    places = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), nodes, strict=True))
    with gm.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "output":
                (results,) = inner.args
            elif inner.op != "placeholder":
                assert inner.op == "call_function", inner.format_node()
                places[inner] = gm.graph.node_copy(inner, places.__getitem__)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(places[results])
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(places[results[user.args[1]]])
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    gm.recompile()


def install(lowered: dict[str, Callable[..., Any]], lose: Callable[[Basis, Exception], None]) -> None:
    """Makes Inductor lower the operators of every basis; the arguments are those of `register` and `_guard`."""
    for basis in BASES.values():
        register(basis, lowered)
    _guard(lose)
    # This entry decomposes nothing; it marks a trace as one for Inductor. Earlier copies of the table lack it, so they
    # are cleared.
    _inductor.decompositions[_mark()] = lambda *_: NotImplemented
    _inductor.fast_random_decomps.cache_clear()


def _mark() -> Any:
    return next(iter(PLAIN_TWINS))


def is_tracing() -> bool:
    """Whether the current trace is for Inductor."""
    tracing = _inductor.get_proxy_mode()
    # Only Inductor's table of decompositions has the entry from `install`.
    return tracing is not None and _mark() in _table(tracing)


def _table(tracing: Any) -> Any:
    """The decompositions of a trace."""
    if hasattr(tracing, "decomposition_table"):
        return tracing.decomposition_table
    table = torch_private.resolve(torch_private.TABLE_OF_TRACE.path)
    return table.get(()) if isinstance(table, contextvars.ContextVar) else table
