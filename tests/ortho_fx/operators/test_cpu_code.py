"""The code that Inductor generates for a CPU, which is not built: passes over tensors, nodes, and what is kept."""

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from ortho_fx import torch_private
from ortho_fx.bases import BASES
from tests.kinds import COMPILED_BASES
from tests.ortho_fx.operators.expansions import AROUND, Around, every_basis, expansion, noise, without_caches

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]

_compiler = torch_private.load(torch_private.TESTS)


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


# Parameters and sums must have fewer elements than these tensors, to tell them apart. Rows, and groups of a third of
# their channels, are whole vectors of 8 (AVX2) and of 16 numbers (AVX-512).
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
    ("basis", "degree"), [*((basis, 3) for basis in COMPILED_BASES), ("hermite", 16), ("tropical", 16), ("fourier", 5)]
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
    [
        *(("hermite", around) for around in ("residual", "dropout", "gate")),
        *((basis, "all") for basis in COMPILED_BASES),
    ],
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
        ("hermite", "group:3", ROWS, 48, torch.contiguous_format),
        *((basis, "channel", IMAGES, 16, torch.channels_last) for basis in COMPILED_BASES),
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
    for graph, other, is_forward in zip(low, high, (True, False), strict=True):
        for calls in (graph.calls, other.calls):
            # The forward prepares the lines of a tropical expansion, and saves them for the backward.
            prepares = is_forward and bool(BASES[basis].maxima)
            assert sum("_prepare" in call for call in calls) == prepares
            assert sum("ortho_fx" in call for call in calls) == 1 + prepares
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


@pytest.mark.parametrize("basis", ["hermite", "fourier"])
def test_sums_of_sizes_that_are_not_known_hold_no_copy_of_the_tensor_for_each_term(basis):
    x = noise(*ROWS).requires_grad_()
    _, backward = cpu_code(expansion(basis), x, dynamic=True)
    assert max(size for nest in backward.nests for size in (*nest.loads, *nest.stores)) == WHOLE
