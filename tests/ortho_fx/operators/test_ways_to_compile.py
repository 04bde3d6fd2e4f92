"""Ways to compile and to train: modes, checkpoints, DDP, FSDP2 and exported programs."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ortho_fx import ExpansionConfig, rewrite_, torch_private
from ortho_fx.operators.generated_code import generated_code
from tests.ortho_fx.operators.expansions import CountedInductor, assert_near, expansion, noise

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]

_compiler = torch_private.load(torch_private.TESTS)


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
    # Around it, since the arguments of its own forward have defaults, which `compile_fx` does not take.
    graph = torch.fx.symbolic_trace(nn.Sequential(activation))
    assert any("ortho_fx" in str(node.target) for node in graph.graph.nodes)
    with generated_code() as sources:
        y = _compiler.compile_fx(graph, [x])(x)
    assert torch.allclose(y, activation(x))
    assert len(sources) == 1
    assert "torch.ops.ortho_fx" not in sources[0]
