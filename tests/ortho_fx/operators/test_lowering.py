"""The operators under torch.compile: code for a CPU and for an H100, its results, memory and caches.

Tests of the code's structure generate it without building it. Tests of results run it, with many inputs in one graph,
and compare it with the eager operator in float64.
"""

import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ortho_fx import ExpansionConfig, rewrite_, torch_private
from ortho_fx.activations.expansion import channel_dim_of, make_activation
from ortho_fx.bases import BASES
from ortho_fx.operators import operator
from ortho_fx.operators.generated_code import generated_code
from tests.h100 import triton_code

pytestmark = pytest.mark.slow

_compiler = torch_private.load(torch_private.TESTS)

every_basis = pytest.mark.parametrize("basis", BASES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expansion(basis, degree=3, granularity="layer", channels=None, seed=0, dtype=None):
    """An activation whose groups all have different expansions."""
    config = ExpansionConfig(basis, degree, granularity=granularity)
    activation = make_activation(config, channels=channels, dtype=dtype)
    with torch.no_grad():
        for number, parameter in enumerate(activation.parameters()):
            parameter.add_(0.1 * noise(*parameter.shape, seed=100 * seed + number, dtype=parameter.dtype))
    return activation


class Around(nn.Module):
    """An activation with other operations around it."""

    def __init__(self, activation, function):
        super().__init__()
        self.activation, self.function = activation, function

    def forward(self, *inputs):
        return self.function(self.activation, *inputs)


AROUND = {
    "alone": (lambda act, x: act(x), 1),
    "residual": (lambda act, x: act(x) + x, 1),
    "dropout": (lambda act, x: F.dropout(act(x), 0.1), 1),
    "gate": (lambda act, x, gate: act(x) * gate, 2),
    "all": (lambda act, x, gate: F.dropout(act(x) * gate, 0.1) + x, 2),
}


# The code for a CPU.


@dataclass(frozen=True)
class Nest:
    """A nest of loops: how often its text loads from tensors and stores to them, by their number of elements."""

    loads: Counter
    stores: Counter


@dataclass(frozen=True)
class CPUGraph:
    """The code of one graph: the wrapper's source, the nests of loops in its kernels, and the operators of the graph.

    `kept` holds the number of elements of each tensor that the forward graph computes and saves for the backward one.
    """

    source: str
    nests: list[Nest]
    calls: list[str]
    kept: list[int]

    def over(self, numel):
        """Loads and stores of tensors of that size, for each nest that has any."""
        return [(n.loads[numel], n.stores[numel]) for n in self.nests if n.loads[numel] or n.stores[numel]]


@contextlib.contextmanager
def without_caches():
    with torch.compiler.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        yield


def cpu_code(function, *inputs, dynamic=None):
    """The code that `torch.compile` would run on one thread: the forward and the backward graph."""
    graphs = {}

    def keep(graph, wrapper):
        assert graph.is_backward not in graphs, "more than one graph"
        graphs[graph.is_backward] = parse(wrapper.value, graph)
        return SimpleNamespace(call=None, __file__="<not built>")

    def backend(graph_module, example_inputs):
        _compiler.compile_fx(graph_module, example_inputs, config_patches={"cpp.threads": 1})
        return graph_module.forward

    torch.compiler.reset()
    with (
        mock.patch.object(_compiler.GraphLowering, "_compile_to_module_lines", keep),
        _compiler.functorch.patch(force_non_lazy_backward_lowering=True),
        without_caches(),
    ):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return graphs[False], graphs.get(True)


def parse(source, graph):
    pattern = r"^(\w+) = async_compile\.cpp_pybinding\(\[.*?\], r'''(.*?)'''\)"
    kernels = dict(re.findall(pattern, source, re.MULTILINE | re.DOTALL))
    launches = re.findall(r"^ +(cpp_\w+)\((.*)\)$", source, re.MULTILINE)
    assert {name for name, _ in launches} == set(kernels)
    nests = []
    for kernel, values in launches:
        text = kernels[kernel]
        parameters = re.search(r"void\s+kernel\((.*?)\)", text, re.DOTALL)[1].split(",")
        sizes = {}
        for parameter, value in zip(parameters, values.split(", "), strict=True):
            if "_ptr" in parameter:
                sizes[parameter.split()[-1]] = graph.sizevars.optimization_hint(graph.get_numel(value))
        for alias, name in re.findall(r"auto (\w+_ptr\d+) = (\w+_ptr\d+);", text):
            sizes[alias] = sizes[name]
        nests += [nest(lines, sizes) for lines in loops(text)]
    calls = [str(node.target) for node in graph.orig_gm.graph.nodes if node.op == "call_function"]
    given = [node for node in graph.orig_gm.graph.nodes if node.op == "placeholder"]
    kept = [int(node.meta["val"].numel()) for node in given if not node.name.startswith(("primals", "tangents"))]
    return CPUGraph(source, nests, calls, sorted(kept))


def loops(text):
    """The lines of each outermost loop."""
    found, outermost = [], None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if outermost is None and line.lstrip().startswith("for("):
            outermost, found = indent, [*found, []]
        if outermost is not None:
            found[-1].append(line)
            if line.strip() == "}" and indent == outermost:
                outermost = None
    return found


def nest(lines, sizes):
    loads, stores = Counter(), Counter()
    for line in lines:
        stored = re.search(r"\.store\((\w+) |^\s*(\w+)\[.*?\] = ", line)
        target = stored and (stored[1] or stored[2])
        for pointer in set(re.findall(r"\b(?:in_out|in|out)_ptr\d+\b", line)):
            (stores if pointer == target else loads)[sizes[pointer]] += 1
    return Nest(loads, stores)


# Parameters and sums must have fewer elements than these tensors, to tell them apart. Rows are whole vectors.
ROWS, IMAGES = (64, 48), (3, 16, 8, 8)
WHOLE = math.prod(ROWS)
assert math.prod(IMAGES) == WHOLE


@functools.cache
def rows_code(basis, degree, around="alone"):
    function, count = AROUND[around]
    activation = F.gelu if basis is None else expansion(basis, degree)
    inputs = [noise(*ROWS, seed=seed).requires_grad_() for seed in range(count)]
    return cpu_code(Around(activation, function) if basis else functools.partial(function, activation), *inputs)


@pytest.mark.parametrize(
    ("basis", "degree"), [*((basis, 3) for basis in BASES), ("hermite", 16), ("tropical", 16), ("fourier", 5)]
)
def test_cpu_code_passes_over_the_tensor_once_in_each_direction(basis, degree):
    forward, backward = rows_code(basis, degree)
    assert forward.over(WHOLE) == [(1, 1)]
    assert backward.over(WHOLE) == [(2, 1)]
    assert "torch.ops.ortho_fx" not in forward.source + backward.source


@pytest.mark.parametrize(("basis", "degree", "sums"), [("fourier", 16, 49)])
def test_cpu_code_reads_again_for_more_sums_than_registers_hold(basis, degree, sums):
    """One pass computes the input gradient and the first sums; about 18 other sums fit into each further pass."""
    forward, backward = rows_code(basis, degree)
    assert forward.over(WHOLE) == [(1, 1)]
    (first, *others) = backward.over(WHOLE)
    assert first == (2, 1)
    assert set(others) <= {(2, 0), (1, 0)}
    assert len(others) <= math.ceil(sums / 17) - 1


@pytest.mark.parametrize(
    ("basis", "around"),
    [*(("hermite", around) for around in ("residual", "dropout", "gate")), *((basis, "all") for basis in BASES)],
)
def test_cpu_code_of_what_is_around_is_that_of_gelu(basis, around):
    # The degree is low: with the operations around it, a tropical rational of degree 3 takes more than one pass.
    ours, gelu = rows_code(basis, 2, around), rows_code(None, None, around)
    for graph, reference in zip(ours, gelu, strict=True):
        assert graph.over(WHOLE) == reference.over(WHOLE)


@pytest.mark.parametrize(
    ("basis", "granularity", "shape", "channels", "layout"),
    [
        ("hermite", "channel", ROWS, 48, torch.contiguous_format),
        ("hermite", "channel", IMAGES, 16, torch.contiguous_format),
        ("hermite", "group:4", ROWS, 48, torch.contiguous_format),
        *((basis, "channel", IMAGES, 16, torch.channels_last) for basis in BASES),
    ],
)
def test_cpu_code_of_groups_passes_over_the_tensor_once(basis, granularity, shape, channels, layout):
    activation = expansion(basis, 3, granularity, channels)
    x = noise(*shape).to(memory_format=layout).requires_grad_()
    forward, backward = cpu_code(activation, x)
    assert (forward.over(WHOLE), backward.over(WHOLE)) == ([(1, 1)], [(2, 1)])
    assert "torch.ops.ortho_fx" not in forward.source + backward.source


@every_basis
def test_a_site_is_one_node_in_each_graph_whatever_its_degree(basis):
    """Inductor's time depends on the nodes; formulas are unrolled while kernels are written, not in its graphs."""
    low, high = rows_code(basis, 3), rows_code(basis, 16)
    for graph, other in zip(low, high, strict=True):
        for calls in (graph.calls, other.calls):
            assert sum("ortho_fx" in call for call in calls) == 1
        # Parameters may take a few nodes more or less, as their loops are unrolled or not.
        assert abs(len(graph.calls) - len(other.calls)) <= 8
        assert len(graph.calls) <= 100


WEIGHTED = {
    "linear": lambda act, x, w, b: F.linear(act(F.linear(x, w, b)), w),
    "layer norm": lambda act, x, w, b: act(F.layer_norm(x @ w, (32,), b, b)) @ w,
    "batch norm": lambda act, x, w, b: act(F.batch_norm(x @ w, None, None, b, b, training=True)) @ w,
    "scaled": lambda act, x, w, b: act((x @ w) * b + b) @ w,
}


@pytest.mark.parametrize("around", WEIGHTED)
def test_as_much_memory_is_kept_as_for_gelu(around):
    inputs = [t.requires_grad_() for t in (noise(2048, 32), noise(32, 32, seed=1), noise(32, seed=2))]
    _, gelu = cpu_code(functools.partial(WEIGHTED[around], F.gelu), *inputs)
    for basis in ("hermite", "tropical_rational"):
        _, ours = cpu_code(Around(expansion(basis), WEIGHTED[around]), *inputs)
        assert [n for n in ours.kept if n >= 2048] == [n for n in gelu.kept if n >= 2048]


# Numbers.

LAST = torch.channels_last
# Special inputs by name, with the granularity and the number of channels of the expansion.
INPUTS = {
    "four by five": (lambda: noise(4, 5), "layer", None),
    "odd": (lambda: noise(33, 7), "layer", None),
    "images": (lambda: noise(2, 3, 5, 7), "layer", None),
    "channels last": (lambda: noise(2, 3, 5, 7).to(memory_format=LAST), "layer", None),
    "one element": (lambda: noise(1), "layer", None),
    "no dimension": (lambda: noise(), "layer", None),
    "transposed": (lambda: noise(7, 5).t(), "layer", None),
    "every other column": (lambda: noise(6, 8)[:, ::2], "layer", None),
    "expanded": (lambda: noise(7, 1).expand(7, 5), "layer", None),
    "many rows": (lambda: noise(4099, 3), "layer", None),
    "long rows": (lambda: noise(3, 4099), "layer", None),
    "one column": (lambda: noise(5003, 1), "layer", None),
    "one row": (lambda: noise(1, 20011), "layer", None),
    "a channel": (lambda: noise(33, 6), "channel", 6),
    "a channel of images": (lambda: noise(2, 6, 5, 7), "channel", 6),
    "a channel, channels last": (lambda: noise(2, 6, 5, 7).to(memory_format=LAST), "channel", 6),
    "a channel, transposed": (lambda: noise(6, 33).t(), "channel", 6),
    "a channel, many rows": (lambda: noise(4099, 3), "channel", 3),
    "three groups": (lambda: noise(4, 5, 6), "group:3", 6),
    "three groups of images": (lambda: noise(2, 6, 5, 7), "group:3", 6),
}
FEW = ("many rows", "a channel, channels last")


def tensors(activation, x):
    return [x, *(getattr(activation, parameter.name) for parameter in activation.basis.parameters)]


def exact(activation, x, seed):
    """The value of the eager operator and its gradients, all in float64."""
    arguments = [x.detach().double().requires_grad_()]
    arguments += [p.detach().double().requires_grad_(p.requires_grad) for p in tensors(activation, x)[1:]]
    y = operator(activation.basis)(*arguments, 1 if activation.channels is None else channel_dim_of(activation, x))
    y.backward(seed.double())
    return [y.detach(), *(t.grad for t in arguments if t.requires_grad)]


def outcome(activation, function, x, seed):
    """The value of the function and the gradients, in the same order."""
    x = x.detach().requires_grad_()
    activation.zero_grad()
    y = function(x)
    y.backward(seed)
    return [y.detach(), *(t.grad for t in tensors(activation, x) if t.requires_grad)]


def assert_near(actual, expected, tolerance, label=None):
    for number, (tensor, reference) in enumerate(zip(actual, expected, strict=True)):
        assert tensor.shape == reference.shape, (label, number)
        error = (tensor.double() - reference).norm()
        assert error <= tolerance * reference.norm(), (label, number, float(error), float(reference.norm()))


def compiled_together(bases, dtype, labels, degree=3):
    """Runs one graph with an activation for each basis and input; yields (label, activation, outcome, exact)."""
    cases = []
    for number, (basis, label) in enumerate((basis, label) for basis in bases for label in labels):
        make, granularity, channels = INPUTS[label]
        activation = expansion(basis, degree, granularity, channels, number, dtype if dtype.itemsize == 8 else None)
        x = make().to(dtype)
        # Every other gradient is an expanded scalar, as `y.sum().backward()` passes it.
        seed = noise(*x.shape, seed=1, dtype=dtype) if number % 2 else torch.ones((), dtype=dtype).expand(x.shape)
        cases.append((f"{basis}, {label}", activation, x.requires_grad_(), seed))
    compiled = torch.compile(lambda *xs: [case[1](x) for case, x in zip(cases, xs, strict=True)], fullgraph=True)
    ys = compiled(*(x for *_, x, _ in cases))
    torch.autograd.backward(ys, [seed for *_, seed in cases])
    for (label, activation, x, seed), y in zip(cases, ys, strict=True):
        gradients = [t.grad for t in tensors(activation, x) if t.requires_grad]
        yield label, activation, [y.detach(), *gradients], exact(activation, x, seed)


@pytest.mark.parametrize(("basis", "labels"), [("hermite", tuple(INPUTS)), *((b, FEW) for b in [*BASES][1:])])
def test_float32_is_that_of_float64_up_to_rounding(basis, labels):
    for label, _, actual, expected in compiled_together([basis], torch.float32, labels):
        assert_near(actual, expected, 1e-5, label)


def test_float64_is_that_of_the_eager_operator_up_to_rounding():
    for label, _, actual, expected in compiled_together(BASES, torch.float64, ("a channel, channels last",)):
        assert_near(actual, expected, 1e-12, label)


@pytest.mark.parametrize(
    ("dtype", "bases"),
    [(torch.bfloat16, ["hermite", "fourier"]), (torch.float16, ["tropical", "tropical_rational"])],
    ids=["bfloat16", "float16"],
)
def test_half_precision_is_rounded_once(dtype, bases):
    """Values and input gradients are within 2 units in the last place of the exact ones.

    If an exact value is below a thousandth of the largest, its terms cancel; then the unit is that of the thousandth.
    Parameters stay in float32, so their gradients are as close as in float32.
    """
    for label, _, actual, expected in compiled_together(bases, dtype, ("a channel, channels last",)):
        for tensor, reference in zip(actual[:2], expected[:2], strict=True):
            assert tensor.dtype == dtype
            magnitude = reference.abs().clamp(min=1e-3 * float(reference.abs().max()))
            ulp = torch.finfo(dtype).eps * 2.0 ** magnitude.log2().floor()
            assert ((tensor.double() - reference).abs() <= 2 * ulp).all(), label
        assert_near(actual[2:], expected[2:], 1e-5, label)


@every_basis
def test_bfloat16_over_a_wide_range_and_with_parameters_of_that_dtype(basis):
    activation = expansion(basis, 5).bfloat16()
    x = torch.linspace(-8, 8, 4001).bfloat16()
    seed = noise(4001, dtype=torch.bfloat16)
    actual = outcome(activation, torch.compile(activation, fullgraph=True), x, seed)
    expected = exact(activation, x, seed)
    # If the exact value cancels, float32 leaves an error of about 1e-6 of the largest value.
    ulp = torch.finfo(torch.bfloat16).eps * 2.0 ** expected[0].abs().clamp(min=1e-30).log2().floor()
    assert ((actual[0].double() - expected[0]).abs() <= 2 * ulp + 1e-6 * expected[0].abs().max()).all()
    assert {t.dtype for t in actual} == {torch.bfloat16}
    assert_near(actual, expected, 0.01)


def test_float16_saturates_as_in_eager_mode():
    activation = expansion("hermite", 5)
    x = torch.tensor([30.0, -30.0, 3.0, 100.0, -100.0] * 7, dtype=torch.float16)
    y = torch.compile(activation, fullgraph=True)(x)
    assert torch.equal(y, activation(x))
    assert y.abs().max() == torch.finfo(torch.float16).max


@pytest.mark.smoke
@pytest.mark.parametrize(("granularity", "channels"), [("layer", None), ("channel", 3)])
def test_no_elements(granularity, channels):
    activation = expansion("hermite", 3, granularity, channels)
    x, seed = torch.empty(0, 3), torch.empty(0, 3)
    actual = outcome(activation, torch.compile(activation, fullgraph=True), x, seed)
    assert_near(actual, exact(activation, x, seed), 0)


def test_several_threads():
    """Each thread adds up sums of its own."""
    activation, x, seed = expansion("fourier", 5), noise(517, 300), noise(517, 300, seed=1)
    with without_caches():
        compiled = torch.compile(activation, fullgraph=True, options={"cpp.threads": 4})
        actual = outcome(activation, compiled, x, seed)
    assert_near(actual, exact(activation, x, seed), 1e-5)


# Dynamic shapes.


class CountedInductor:
    """Inductor as a backend that counts the graphs which it compiles."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph_module, inputs):
        self.graphs += 1
        return _compiler.lookup_backend("inductor")(graph_module, inputs)


def shapes_of(batch, layout):
    return noise(batch, 24) if layout is None else noise(batch, 6, 5, 7).to(memory_format=layout)


@pytest.mark.parametrize(
    ("basis", "granularity", "channels", "layout", "dynamic", "compiles"),
    [
        ("hermite", "layer", None, None, None, 2),
        ("fourier", "layer", None, None, True, 1),
        ("tropical", "channel", 24, None, "mark", 1),
        ("tropical_rational", "channel", 6, LAST, "mark", 1),
        ("hermite", "group:3", 6, LAST, True, 2),
    ],
)
def test_batches_of_four_sizes_take_one_or_two_compiles(basis, granularity, channels, layout, dynamic, compiles):
    activation = expansion(basis, 3, granularity, channels)
    counter = CountedInductor()
    dims = None if dynamic == "mark" else dynamic
    compiled = torch.compile(activation, backend=counter, fullgraph=True, dynamic=dims)
    for batch in (4, 9, 33, 128):
        x = shapes_of(batch, layout)

        def call(x):
            if dynamic == "mark":
                _compiler.mark_dynamic(x, 0)
            return compiled(x)

        seed = noise(*x.shape, seed=1)
        assert_near(outcome(activation, call, x, seed), exact(activation, x, seed), 1e-5, batch)
    assert counter.graphs == compiles


def test_sizes_that_depend_on_data():
    layer, channel = expansion("hermite"), expansion("tropical", 3, "channel", 7)
    with _compiler.dynamo.patch(capture_dynamic_output_shape_ops=True):
        rows = torch.compile(lambda x: channel(x[x[:, 0] > 0]), fullgraph=True)
        elements = torch.compile(lambda x: layer(x[x > 0]), fullgraph=True)
        for batch in (5, 50):
            for activation, compiled, pick in (
                (channel, rows, lambda x: x[:, 0] > 0),
                (layer, elements, lambda x: x > 0),
            ):
                x = noise(batch, 7).requires_grad_()
                activation.zero_grad()
                y = compiled(x)
                y.sum().backward()
                picked = pick(x)
                value, grad_x, *rest = exact(activation, x[picked], torch.ones_like(y))
                gradients = [p.grad for p in tensors(activation, x)[1:] if p.requires_grad]
                assert_near([y, x.grad[picked], *gradients], [value, grad_x, *rest], 1e-5)


@pytest.mark.parametrize("basis", ["hermite", "fourier"])
def test_sums_of_sizes_that_are_not_known_hold_no_copy_of_the_tensor_for_each_term(basis):
    x = noise(*ROWS).requires_grad_()
    _, backward = cpu_code(expansion(basis), x, dynamic=True)
    assert max(size for nest in backward.nests for size in (*nest.loads, *nest.stores)) == WHOLE


# Ways to compile and to train.


class MLP(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.checkpointed = checkpointed

    def inner(self, x):
        return self.down(self.act(self.up(x)))

    def forward(self, x):
        return x + (checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x))


def rewritten(**keywords):
    model = MLP(**keywords)
    rewrite_(model, ExpansionConfig("hermite", 3))
    return model


def assert_trains_as(reference, model, call):
    """Asserts that `call` gives the value and gradients of the reference in float64."""
    x = noise(8, 16)
    y = call(x)
    y.square().sum().backward()
    reference = copy.deepcopy(reference).double()
    expected = reference(x.double())
    expected.square().sum().backward()
    names = dict(reference.named_parameters())
    actual = {name: whole(p.grad) for name, p in model.named_parameters()}
    assert_near([y, *actual.values()], [expected, *(names[name].grad for name in actual)], 1e-5)


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def test_the_backend_and_rewrite_make_the_same_kernels():
    """test_backend.py compares the results."""
    x = noise(8, 16)
    with generated_code() as codes:
        torch.compile(rewritten())(x).sum().backward()
    options = {"basis": "hermite", "degree": 3}
    with generated_code() as others:
        torch.compile(MLP(), backend="ortho_fx", options=options)(x).sum().backward()
    assert len(codes) == len(others) == 2
    for code, other in zip(codes, others, strict=True):
        kernels = re.findall(r"async_compile\.cpp_pybinding\(.*?^'''", code, re.MULTILINE | re.DOTALL)
        assert kernels == re.findall(r"async_compile\.cpp_pybinding\(.*?^'''", other, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("backend", ["inductor", "ortho_fx"])
def test_modes(mode, backend):
    model = rewritten()
    assert_trains_as(rewritten(), model, torch.compile(model, mode=mode, backend=backend))


def test_compiled_autograd_lowers_the_backward():
    """It traces the same as in test_interoperability.py, which does not use Inductor."""
    model = rewritten()
    with _compiler.dynamo.patch(compiled_autograd=True):
        assert_trains_as(rewritten(), model, torch.compile(model))


def test_checkpointed_regions():
    model = rewritten(checkpointed=True)
    assert_trains_as(rewritten(), model, torch.compile(model, fullgraph=True))


@pytest.mark.usefixtures("process_group")
def test_graphs_that_are_split_at_the_buckets_of_ddp():
    # The first bucket holds one megabyte, the size of one of these linear layers.
    model = nn.Sequential(rewritten(), nn.Linear(16, 1 << 14), nn.Linear(1 << 14, 16), rewritten())
    reference = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    counter = CountedInductor()
    with _compiler.dynamo.patch(optimize_ddp=True):
        assert_trains_as(reference, model, torch.compile(wrapped, backend=counter))
    assert counter.graphs > 1


@pytest.mark.usefixtures("process_group")
def test_fsdp2():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(rewritten(), rewritten())
    reference = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    assert_trains_as(reference, model, torch.compile(model))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_are_lowered(strict):
    model, x = rewritten(), noise(8, 16)
    program = torch.export.export(model, (x,), strict=strict)
    compiled = torch.compile(program.module(), fullgraph=True)
    with generated_code() as codes:
        y = compiled(x)
        y.sum().backward()
    assert_near([y], [copy.deepcopy(model).double()(x.double())], 1e-5)
    assert len(codes) == 2
    assert not any("torch.ops.ortho_fx" in code for code in codes)


def test_a_graph_that_dynamo_has_not_seen_is_lowered():
    activation, x = expansion("hermite").requires_grad_(False), noise(8, 16)
    graph = torch.fx.symbolic_trace(activation)
    assert any("ortho_fx" in str(node.target) for node in graph.graph.nodes)
    with generated_code() as sources:
        y = _compiler.compile_fx(graph, [x])(x)
    assert torch.allclose(y, activation(x))
    assert len(sources) == 1
    assert "torch.ops.ortho_fx" not in sources[0]


# Caches.

SCRIPT = """
import json, sys
import torch
from torch import nn
import ortho_fx
from ortho_fx import torch_private

counters = torch_private.load(torch_private.TESTS).counters

results = []
for degree in map(int, sys.argv[1:]):
    torch.compiler.reset()
    counters.clear()
    model, x = nn.Sequential(nn.GELU()), torch.linspace(-2, 2, 32).reshape(4, 8)
    y = torch.compile(model, backend="ortho_fx", options={"degree": degree})(x)
    y.sum().backward()
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    results.append([hits, y.tolist(), model[0].coefficients.grad.tolist(), model(x).tolist()])
print(json.dumps([ortho_fx.__file__, results]))
"""


def in_a_new_process(folder, *degrees, package=""):
    """Compiles a small model for each degree, with the caches that earlier processes left in the folder.

    The result has, for each degree, the number of cache hits, the values, the gradients and the eager model's values.
    """
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": str(package),
        # Inductor asks the system for the processor's features instead of building a test program.
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
    }
    command = [sys.executable, "-c", SCRIPT, *map(str, degrees)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, results = json.loads(done.stdout.splitlines()[-1])
    return Path(file), results


def changed_package(folder, addition):
    """A copy of the installed package with `addition` at the end of its lowering."""
    for name in ("ortho_fx", "ortho_fx.passes", "ortho_fx.models"):
        (source,) = find_spec(name).submodule_search_locations
        target = folder / name.replace(".", "/")
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    with (folder / "ortho_fx" / "operators" / "lowering.py").open("a") as file:
        file.write(addition)
    return folder


DOUBLED = """
from ortho_fx.bases.hermite import Hermite
_evaluate = Hermite.evaluate
Hermite.evaluate = lambda self, x, *parameters: _evaluate(self, x, *parameters) * 2.0
"""


def test_another_process_finds_the_code_unless_formulas_or_options_changed(tmp_path):
    _, [(_, *first)] = in_a_new_process(tmp_path, 3)
    _, [(hits, *again), (others, value, _, eager)] = in_a_new_process(tmp_path, 3, 4)
    assert (hits, others) == (1, 0)
    assert again == first
    assert torch.allclose(torch.tensor(value), torch.tensor(eager))
    assert value != first[0]

    package = changed_package(tmp_path / "changed", DOUBLED)
    file, [(hits, value, *_)] = in_a_new_process(tmp_path, 3, package=package)
    assert file == package / "ortho_fx" / "__init__.py"
    assert hits == 0
    assert torch.allclose(torch.tensor(value), 2 * torch.tensor(first[0]))


# The code for an H100.

BIG = (4096, 3072)


def empty(*shape, dtype=torch.bfloat16, layout=torch.contiguous_format):
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout).requires_grad_()


def gpu_code(activation, *inputs, around="alone", **keywords):
    return triton_code(Around(activation, AROUND[around][0]), *inputs, **keywords)


def small_kernels(basis, parameters=torch.float32):
    """The most kernels that a backward may have for its sums; a rational reorders its lines and casts gradients too."""
    return 2 + (basis == "tropical_rational") * (1 if parameters == torch.float32 else 2)


def assert_one_pass(code, basis, loads=2, stores=1, forward=1):
    """Asserts one kernel over the tensor in each direction that touches each element once, and few for the sums."""
    (kernel,) = code.forward.big
    assert (kernel.kind, kernel.loads, kernel.stores) == ("pointwise", forward, 1), str(code)
    (kernel,) = code.backward.big
    assert sorted((a.loads, a.stores) for a in kernel.whole) == [(0, 1)] * stores + [(1, 0)] * loads, str(code)
    assert len(code.backward.small) <= small_kernels(basis), str(code)


@pytest.mark.parametrize(
    "x",
    [
        empty(*BIG, dtype=torch.float32),
        empty(*BIG),
        empty(32, 197, 3072),
        empty(4099, 3071),
        empty(32, 384, 14, 14, layout=LAST),
    ],
    ids=["float32", "bfloat16", "batches", "odd", "channels last"],
)
@every_basis
def test_gpu_code_passes_over_the_tensor_once(basis, x):
    assert_one_pass(gpu_code(expansion(basis), x), basis)


@every_basis
def test_gpu_code_of_a_gated_product(basis):
    code = gpu_code(expansion(basis), empty(*BIG), empty(*BIG), around="gate")
    assert_one_pass(code, basis, loads=3, stores=2, forward=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_basis
def test_gpu_code_of_an_mlp_is_that_of_gelu_and_few_kernels_for_the_sums(basis, dtype):
    def code(activation):
        model = nn.Sequential(nn.Linear(768, 3072), activation, nn.Linear(3072, 768)).to(dtype)
        return triton_code(model, empty(4096, 768, dtype=dtype), whole=math.prod(BIG))

    ours, gelu = code(expansion(basis)), code(nn.GELU())
    assert [(k.kind, k.loads, k.stores) for k in ours.forward.big] == [("pointwise", 1, 1)]
    assert ours.backward.externs == gelu.backward.externs
    # One of these kernels computes the gradient of the bias.
    assert [(k.loads, k.stores) for k in ours.backward.big] == [(k.loads, k.stores) for k in gelu.backward.big]
    assert len(ours.backward.small) <= len(gelu.backward.small) + small_kernels(basis, dtype), str(ours)


@pytest.mark.parametrize(("basis", "degree"), [("hermite", 16), ("tropical", 16), ("hermite", 32)])
def test_gpu_code_of_high_degrees(basis, degree):
    assert_one_pass(gpu_code(expansion(basis, degree), empty(*BIG)), basis)


@pytest.mark.parametrize(
    ("granularity", "channels", "x"),
    [
        ("channel", 3072, empty(*BIG)),
        ("channel", 384, empty(32, 384, 14, 14)),
        ("channel", 384, empty(32, 384, 14, 14, layout=LAST)),
        ("group:4", 3072, empty(*BIG)),
    ],
    ids=["channels", "channels of images", "channels last", "groups"],
)
@pytest.mark.parametrize("basis", ["hermite", "fourier"])
def test_gpu_code_of_groups(basis, granularity, channels, x):
    assert_one_pass(gpu_code(expansion(basis, 3, granularity, channels), x), basis)


@pytest.mark.parametrize("basis", ["hermite", "tropical"])
def test_gpu_code_of_sizes_that_are_not_known(basis):
    assert_one_pass(gpu_code(expansion(basis), empty(*BIG), dynamic=True), basis)
