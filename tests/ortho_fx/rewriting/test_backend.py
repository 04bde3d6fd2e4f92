"""The hook: in any way of compiling a model, the result is that of `rewrite_` before the compilation."""

import copy
import warnings
from functools import partial
from importlib.metadata import entry_points

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, rewrite_
from ortho_fx.bases import BASES
from ortho_fx.operators.generated_code import generated_code

pytestmark = pytest.mark.slow

OPTIONS = {"basis": "hermite", "degree": 4}


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(F.silu(self.up(x)) + self.act(self.up(x)).relu())


@torch.compiler.disable
def uncompiled():
    """Breaks the graph."""


class Network(nn.Module):
    def __init__(self, blocks=2, checkpointed=False, broken=False):
        super().__init__()
        self.blocks = nn.ModuleList(MLP() for _ in range(blocks))
        self.checkpointed, self.broken = checkpointed, broken

    def forward(self, x):
        for block in self.blocks:
            if self.broken:
                uncompiled()
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


class Own(nn.Module):
    """Calls activations in the compiled method itself, twice in a line and in a loop."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(2):
            x = F.gelu(self.a(F.gelu(self.b(x)))) + self.b(x).relu()
        return x


def compile_model(model, **keywords):
    return torch.compile(model, backend="ortho_fx", options=OPTIONS, **keywords)


def compile_in_place(model):
    model.compile(backend="ortho_fx", options=OPTIONS)
    return model


def compile_blocks(model):
    for block in model.blocks:
        block.compile(backend="ortho_fx", options=OPTIONS)
    return model


def compile_closure(model):
    return compile_model(lambda x: model(x) * 1)


def compile_argument(model):
    compiled = compile_model(lambda module, x: module(x))
    return lambda x: compiled(model, x)


def first_called_in_inference_mode(model):
    compiled = compile_model(model)
    with torch.inference_mode():
        compiled(torch.zeros(4, 8, dtype=torch.float64))
    return compiled


@pytest.mark.parametrize(
    ("build", "compile_it"),
    [
        (Network, compile_model),
        (Network, compile_in_place),
        (lambda: Network(10), compile_blocks),
        (Network, compile_closure),
        (Network, compile_argument),
        (Network, lambda model: compile_model(model, dynamic=True)),
        (Network, first_called_in_inference_mode),
        (lambda: Network(checkpointed=True), compile_model),
        (lambda: Network(broken=True), compile_model),
        (Own, lambda model: compile_model(model, fullgraph=True)),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()), compile_model),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()), compile_in_place),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()), lambda model: compile_model(model.forward)),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()), lambda model: compile_model(partial(model.forward))),
    ],
    ids=[
        "model",
        "model.compile",
        "ten blocks one by one",
        "closure",
        "argument",
        "dynamic",
        "inference mode",
        "checkpointed",
        "graph breaks",
        "own calls",
        "sequential",
        "sequential, model.compile",
        "sequential, its forward",
        "sequential, a partial",
    ],
)
def test_outputs_gradients_and_names_are_those_of_rewrite(build, compile_it):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = build().double()
    reference = copy.deepcopy(model)
    rewrite_(reference, ExpansionConfig(**OPTIONS))
    x = torch.randn(4, 8, dtype=torch.float64)
    compiled = compile_it(model)
    for _ in range(2):  # the first call rewrites the model, the second runs the rewritten model
        output, expected = compiled(x), reference(x)
        torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)
        output.sum().backward()
        expected.sum().backward()
        assert list(model.state_dict()) == list(reference.state_dict())
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_one_inductor_compile_and_no_recompile_of_a_rewritten_model():
    torch.compiler.reset()
    rewritten = Network()
    rewrite_(rewritten)
    for model in (Network(), rewritten):
        with generated_code() as codes:
            compiled = compile_model(model)
            for _ in range(3):
                compiled(torch.randn(4, 8)).sum().backward()
        assert len(codes) == 2  # of the forward and of the backward graph


@pytest.mark.smoke
def test_parameters_are_read_at_every_call():
    model = Network()
    compiled, x = compile_model(model), torch.randn(4, 8)
    before = compiled(x)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert not torch.equal(before, x)
    assert torch.equal(compiled(x), x)


def helper(x):
    return F.gelu(x)


def test_calls_that_no_module_makes_are_left_with_a_warning():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.warns(
        UserWarning, match=r"ortho_fx left gelu at .*test_backend\.py:\d+: no module's own code calls it"
    ):
        compile_model(lambda x: helper(model(x)))(torch.randn(2, 8))
    assert isinstance(model[1], HermiteActivation)


def test_an_activation_that_nothing_holds_is_left_with_a_warning():
    activation, x = nn.GELU(), torch.randn(2, 8)
    with pytest.warns(UserWarning, match="ortho_fx left gelu.*: the model itself is the activation, and nothing holds"):
        torch.testing.assert_close(compile_in_place(activation)(x), F.gelu(x))


def test_a_model_without_activations_is_warned_of():
    with pytest.warns(UserWarning, match="ortho_fx found no activation to replace in Linear"):
        compile_model(nn.Linear(8, 8))(torch.randn(2, 8))
    rewritten = nn.Sequential(nn.Linear(8, 8), HermiteActivation())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ortho_fx")
        compile_model(rewritten)(torch.randn(2, 8))


def refused(model, **keywords):
    torch.compiler.reset()
    names = list(model.state_dict())
    with pytest.raises(OrthoFxError) as caught:
        torch.compile(model, backend="ortho_fx", **keywords)(torch.randn(4, 8))
    assert list(model.state_dict()) == names
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"options": {"bases": "hermite"}},
            "unknown option 'bases'; options are basis, degree, init, granularity, clamp, tied, gated "
            "and those of torch._inductor.config, and disable",
        ),
        ({"options": {"degree": 99}}, "degree of hermite must be an integer from 1 to 32; got 99"),
        (
            {"options": {"basis": "sine"}},
            f"basis must be one of {', '.join(BASES)}; got 'sine'",
        ),
        ({"options": {"max_autotune": "yes"}}, "Unexpected type of attr max_autotune, got str should be bool"),
    ],
)
def test_wrong_options_are_named(keywords, message):
    assert refused(Network(), **keywords) == message


def test_an_optimizer_that_would_miss_the_parameters_is_refused():
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters())
    assert refused(model) == (
        "the optimizer AdamW would miss the new parameters: "
        "call ortho_fx.rewrite_(model, config) on the Network before making it"
    )
    del optimizer
    compile_model(model)(torch.randn(4, 8))


@pytest.mark.usefixtures("process_group")
def test_wrappers_of_torch_distributed_are_refused_late_and_work_after_rewrite():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))

    for wrap, name in ((DistributedDataParallel, "DistributedDataParallel"), (shard, "FSDPNetwork")):
        wrapped = wrap(Network())
        assert refused(wrapped).startswith(f"{name} would miss the new parameters: call ortho_fx.rewrite_")
        model = Network()
        rewrite_(model)
        compile_model(wrap(model))(torch.randn(4, 8)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_backend_is_found_by_name_without_an_import():
    (entry,) = entry_points(group="torch_dynamo_backends", name="ortho_fx")
    assert entry.value == "ortho_fx.rewriting.backend:ortho_fx"


ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


def chosen(x, name):
    x = ACTIVATIONS[name]()(x)
    return F.gelu(x) + x * torch.tanh(F.softplus(x))


class Formulas(nn.Module):
    """Writes activations as formulas, picks them by name, and calls a function that does so."""

    def __init__(self):
        super().__init__()
        self.linear, self.slope, self.name = nn.Linear(8, 8), 1.702, "relu"

    def forward(self, x):
        x = self.linear(x)
        x = 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))
        x = x * torch.sigmoid(self.slope * x) + F.relu(x) ** 2
        return chosen(x, self.name) + nn.SiLU()(x)


@pytest.mark.parametrize("nested", [False, True])
def test_formulas_and_helpers_are_replaced_in_the_first_call_already(nested):
    torch.manual_seed(0)
    model, x = Formulas().double(), torch.randn(4, 8, dtype=torch.float64)
    model = nn.Sequential(model) if nested else model
    reference = copy.deepcopy(model)
    assert len(rewrite_(reference, ExpansionConfig(**OPTIONS)).replaced) == 7
    compiled = torch.compile(model, backend="ortho_fx", options=OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.testing.assert_close(compiled(x), reference(x))
        torch.testing.assert_close(compiled(x), reference(x))
    assert model.state_dict().keys() == reference.state_dict().keys()
