"""Rewritten models with the rest of PyTorch: export, torch.func, hooks, compilers, checkpoints, devices, processes.

Every reference is a plain run of the same model, in float64. As a script, this file is one of two processes.
"""

import copy
import io
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as plain_hessian
from torch.autograd.functional import jacobian as plain_jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, gains, revert_, rewrite_, torch_private
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.operators.generated_code import generated_code
from ortho_fx.processes import leave
from tests.kinds import COMPILED_BASES

pytestmark = pytest.mark.slow

CONFIGS = [ExpansionConfig(basis, 2) for basis in COMPILED_BASES]
CONFIGS += [ExpansionConfig(basis, 2, granularity="channel", clamp=1.5) for basis in COMPILED_BASES]
CONFIGS.insert(len(COMPILED_BASES), ExpansionConfig("fourier", 2, tied=True))
LAYER, CHANNEL = ExpansionConfig("hermite", 3), ExpansionConfig("tropical", 2, granularity="channel", clamp=1.5)


def name_of(config):
    return f"{config.basis}-{config.granularity}" + "-tied" * config.tied


every_kind = pytest.mark.parametrize("config", CONFIGS, ids=name_of)


class Network(nn.Module):
    """One activation is a module, which is exchanged; the other is a call, which is replaced in the source."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)

    def forward(self, x):
        return self.down(F.silu(self.act(self.up(x))))


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rewritten(config, seed=0):
    """A rewritten network whose expansions all differ, those of its channels too."""
    torch.manual_seed(seed)
    model = Network().double()
    rewrite_(model, config, example_inputs=inputs(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pure(model):
    """The sum of the model's squared outputs as a function of parameters and an input; and the parameters."""
    buffers = dict(model.named_buffers())

    def loss(parameters, x):
        return functional_call(model, (parameters, buffers), (x,)).square().sum()

    return loss, {name: parameter.detach() for name, parameter in model.named_parameters()}


def outcome(model, x, call=None):
    """Outputs, and the gradients of the parameters by name."""
    model.zero_grad()
    y = (model if call is None else call)(x)
    y.square().sum().backward()
    return y.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("config", "strict"),
    [*((config, False) for config in CONFIGS), (LAYER, True), (CHANNEL, True)],
    ids=lambda value: f"strict={value}" if isinstance(value, bool) else name_of(value),
)
@pytest.mark.usefixtures("without_loops")
def test_export(config, strict):
    model = rewritten(config)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (inputs(3, 4),), dynamic_shapes=({0: batch},), strict=strict)
    assert any("ortho_fx" in str(node.target) for node in exported.graph.nodes)
    x = inputs(5, 4, seed=2)
    expected = outcome(model, x)
    module = exported.module()
    assert_close(outcome(module, x), expected)
    loss, parameters = pure(module)
    assert_close(grad(loss)(parameters, x), expected[1])
    assert_close(vmap(module)(x.unsqueeze(1)).squeeze(1), expected[0])

    decomposed = exported.run_decompositions()
    assert not any("ortho_fx" in str(node.target) for node in decomposed.graph.nodes)
    for program in (exported, decomposed):
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        assert_close(torch.export.load(file).module()(x), expected[0])


@every_kind
@pytest.mark.usefixtures("without_loops")
def test_gradients_of_each_sample(config):
    model, x = rewritten(config), inputs(5, 4)
    loss, parameters = pure(model)
    together = vmap(grad(loss), (None, 0))(parameters, x)
    for sample in range(5):
        _, expected = outcome(model, x[sample])
        assert_close({name: gradients[sample] for name, gradients in together.items()}, expected)
    assert_close(grad(lambda p: vmap(loss, (None, 0))(p, x).sum())(parameters), outcome(model, x)[1])


@every_kind
@pytest.mark.usefixtures("without_loops")
def test_ensembles(config):
    models, x = [rewritten(config, seed) for seed in range(3)], inputs(5, 4)
    parameters, buffers = stack_module_state(models)
    y = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    y.square().sum().backward()
    for member, model in enumerate(models):
        expected, gradients = outcome(model, x)
        assert_close(y[member], expected)
        assert_close({name: stacked.grad[member] for name, stacked in parameters.items()}, gradients)


@every_kind
@pytest.mark.usefixtures("without_loops")
def test_jacobians_and_hessians_of_both_modes(config):
    model, x = rewritten(config), inputs(4)
    loss, parameters = pure(model)
    jacobian, curvature = plain_jacobian(model, x), plain_hessian(lambda t: loss(parameters, t), x)
    assert_close(jacrev(model)(x), jacobian)
    assert_close(jacfwd(model)(x), jacobian)
    assert_close(plain_jacobian(model, x, vectorize=True), jacobian)
    assert_close(jvp(model, (x,), (x,))[1], jacobian @ x)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert_close(outer(inner(lambda t: loss(parameters, t)))(x), curvature)
    batch = inputs(3, 4)
    curvatures = vmap(hessian(lambda t: loss(parameters, t)))(batch)
    assert_close(curvatures[2], plain_hessian(lambda t: loss(parameters, t), batch[2]))


@every_kind
def test_dual_numbers(config):
    model, x = rewritten(config), inputs(5, 4)
    loss, parameters = pure(model)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, torch.ones_like(p)) for name, p in parameters.items()}
        tangent = forward_ad.unpack_dual(loss(duals, forward_ad.make_dual(x, x))).tangent
    slopes, slope = grad(loss, (0, 1))(parameters, x)
    assert_close(tangent, sum(s.sum() for s in slopes.values()) + (slope * x).sum())


@every_kind
def test_transforms_inside_of_others(config):
    model, x = rewritten(config), inputs(4)
    loss, parameters = pure(model)
    curvature, slope = plain_hessian(lambda t: loss(parameters, t), x), grad(loss, 1)(parameters, x)

    def penalty(t):
        value, pull = vjp(lambda s: loss(parameters, s), t)
        return pull(torch.ones_like(value))[0].square().sum()

    assert_close(grad(penalty)(x), 2 * curvature @ slope)
    leaf = x.clone().requires_grad_()
    assert_close(torch.autograd.grad(penalty(leaf), leaf)[0], 2 * curvature @ slope)

    value, pull = vjp(lambda s: loss(parameters, s), x)
    with torch.no_grad():  # the transform has ended already
        assert_close(pull(torch.ones_like(value))[0], slope)

    (plain,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
    expected = torch.autograd.grad(plain.square().sum(), list(model.parameters()), materialize_grads=True)
    actual = grad(lambda p: grad(loss, 1)(p, x).square().sum())(parameters)
    assert_close(list(actual.values()), list(expected))


def test_compiled_transforms():
    loss, parameters = pure(rewritten(LAYER))

    def curvature(parameters, x):
        return jvp(lambda t: jvp(lambda s: loss(parameters, s), (t,), (x,))[1], (x,), (x,))[1]

    cases = [
        (vmap(grad(loss), (None, 0)), (parameters, inputs(3, 4))),
        (grad(lambda x: grad(loss, 1)(parameters, x).square().sum()), (inputs(4),)),
        (hessian(lambda x: loss(parameters, x)), (inputs(4),)),
        (grad(curvature), (parameters, inputs(4))),
        (vmap(jacrev(jacrev(lambda x: loss(parameters, x)))), (inputs(3, 4),)),
    ]
    for function, arguments in cases:
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert_close(compiled(*arguments), function(*arguments))


def test_compiled_gradients_of_each_sample_hold_no_operator_of_ours():
    loss, parameters = pure(rewritten(CHANNEL))
    each, x = vmap(grad(loss), (None, 0)), inputs(3, 4)
    with generated_code() as codes:
        compiled = torch.compile(each, fullgraph=True)(parameters, x)
    assert len(codes) == 1
    assert_close(compiled, each(parameters, x))
    assert not any("torch.ops.ortho_fx" in code for code in codes)  # comments may name one


@every_kind
def test_hooks(config):
    model, calls = rewritten(config), []
    for name, module in (("model", model), ("module", model.act), ("call", model.silu_expansion_0)):
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(f"before {name}"))
        module.register_forward_hook(lambda module, args, output, name=name: calls.append(f"after {name}"))
        module.register_full_backward_pre_hook(lambda module, output, name=name: calls.append(f"back into {name}"))
        module.register_full_backward_hook(lambda module, inp, output, name=name: calls.append(f"back out of {name}"))
    x = inputs(5, 4).requires_grad_()
    model(x).sum().backward()
    assert calls == [
        *("before model", "before module", "after module", "before call", "after call", "after model"),
        *("back into model", "back into call", "back out of call"),
        *("back into module", "back out of module", "back out of model"),
    ]
    assert x.grad is not None


class Doubled(nn.Module):
    def forward(self, parameter):
        return 2 * parameter

    def right_inverse(self, value):
        return value / 2


@every_kind
def test_parametrizations(config):
    x, plain = inputs(5, 4), rewritten(config)
    expected = plain(x)
    before, after = Network().double(), copy.deepcopy(plain)
    parametrize.register_parametrization(before.up, "weight", Doubled())
    rewrite_(before, config, example_inputs=x)
    for model in (before, after):
        nn.utils.parametrizations.weight_norm(model.down)
        name = next(name for name, _ in model.act.named_parameters())
        parametrize.register_parametrization(model.act, name, Doubled())
        outcome(model, x)
    assert_close(after(x), expected)
    parametrize.remove_parametrizations(after.act, name)
    assert_close(after(x), expected)
    assert type(after.act) is type(plain.act)


class OwnWeight(nn.Module):
    """Has a parameter of its own in the class whose activation call is rewritten."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(inputs(4, 4))

    def forward(self, x):
        return F.silu(x @ self.weight)


def test_a_rewritten_class_stays_below_those_that_parametrize_makes():
    x, model = inputs(5, 4), OwnWeight()
    original = model(x)
    rewrite_(model)
    expected = model(x)
    parametrize.register_parametrization(model, "weight", Doubled())
    assert str(rewrite_(model)).startswith("0 replaced, 0 left")
    for kept in (model, copy.deepcopy(model)):
        assert_close(kept(x), expected)
    parametrize.remove_parametrizations(model, "weight")
    assert_close(model(x), expected)

    parametrize.register_parametrization(model, "weight", Doubled())
    revert_(model)
    assert_close(model(x), original)
    rewrite_(model)
    assert_close(model(x), expected)
    parametrize.remove_parametrizations(model, "weight")
    assert_close(model(x), expected)


@every_kind
def test_symbolic_trace(config):
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)).double()
    rewrite_(model, config, example_inputs=inputs(5, 4))
    traced = torch.fx.symbolic_trace(model)
    assert any("ortho_fx" in str(node.target) for node in traced.graph.nodes)
    assert_close(outcome(traced, inputs(5, 4)), outcome(model, inputs(5, 4)))
    assert_close(torch.fx.symbolic_trace(rewritten(config))(inputs(5, 4)), rewritten(config)(inputs(5, 4)))


def test_the_graph_of_an_expansion_alone_has_one_input():
    activation, x = HermiteActivation(), inputs(5, 4)
    traced = torch.fx.symbolic_trace(activation)
    assert [node.target for node in traced.graph.find_nodes(op="placeholder")] == ["x"]
    assert_close(traced(x), activation(x))
    assert_close(activation(input=x), activation(x))
    for strict in (True, False):  # which read the signature
        assert_close(torch.export.export(activation, (), {"input": x}, strict=strict).module()(input=x), activation(x))


def test_symbolic_trace_of_channels_in_an_unknown_dimension_says_what_it_needs():
    activation = HermiteActivation(granularity="channel", channels=6)
    message = r"^HermiteActivation needs channel_dim= for torch\.fx to trace it$"
    with pytest.raises(OrthoFxError, match=message):
        torch.fx.symbolic_trace(nn.Sequential(activation))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@every_kind
def test_gradient_checkpointing(config, reentrant):
    model, x = rewritten(config), inputs(5, 4).requires_grad_()
    expected = outcome(model, x)
    assert_close(outcome(model, x, lambda t: checkpoint(model, t, use_reentrant=reentrant)), expected)


def test_inductor():
    model, x = rewritten(CHANNEL), inputs(5, 4)
    expected = outcome(model, x)
    whole = torch.compile(model, fullgraph=True)
    assert_close(outcome(model, x, whole), expected)
    with torch.inference_mode():
        assert_close(whole(x), expected[0])
    in_place = copy.deepcopy(model)
    in_place.compile()
    assert_close(outcome(in_place, x), expected)


def test_compiled_autograd():
    model, x = rewritten(LAYER), inputs(5, 4)
    with torch_private.load(torch_private.TESTS).dynamo.patch(compiled_autograd=True):
        actual = outcome(model, x, torch.compile(model, backend="aot_eager"))
    assert_close(actual, outcome(model, x))


@every_kind
def test_modes(config):
    model, x = rewritten(config), inputs(5, 4)
    expected = model(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(model(x), expected)
            built = Network().double()
            rewrite_(built, config, example_inputs=x)
        for name, value in rewritten_state(config).items():
            assert_close(built.act.state_dict()[name], value)
    single = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = single(x.float())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() <= 0.03 * expected.norm()
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def rewritten_state(config):
    """The initial state of the module that is exchanged."""
    model = Network().double()
    rewrite_(model, config, example_inputs=inputs(5, 4))
    return model.act.state_dict()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_functions_are_fitted_and_gains_computed_in_every_mode(mode):
    expected = gains(F.silu)
    # No other test uses these settings, since initial values are cached.
    clamp = 1.25 if mode is torch.no_grad else 1.75
    with mode():
        assert gains(F.silu) == expected
        for init in ("stable", "fit"):
            HermiteActivation(init=init, reference=F.mish, clamp=clamp)


@every_kind
def test_tied_weights_stay_tied(config):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.network, self.head = nn.Embedding(7, 4), Network(), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(F.relu(self.network(self.embedding(tokens))))

    model = Tied().double()
    rewrite_(model, config, example_inputs=torch.arange(7))
    for kept in (model, copy.deepcopy(model)):
        assert kept.head.weight is kept.embedding.weight
        outcome(kept, torch.arange(7))


@every_kind
def test_meta_device(config):
    expected, trained, x = rewritten_state(config), rewritten(config), inputs(5, 4)
    for inside in (True, False):
        with torch.device("meta"):
            model = Network().double()
            if inside:
                rewrite_(model, config, example_inputs=inputs(8, 4).to("meta"))
        if not inside:
            rewrite_(model, config, example_inputs=inputs(8, 4).to("meta"))
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        assigned = copy.deepcopy(model)
        assigned.load_state_dict(trained.state_dict(), assign=True)
        assert_close(outcome(assigned, x), outcome(trained, x))

        model.to_empty(device="cpu")
        for module in model.modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.detach().fill_(torch.nan)
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert_close(dict(model.act.state_dict()), dict(expected))
        assert model(x).isfinite().all()


def test_torchscript_traces_and_refuses_to_compile():
    model, x = rewritten(CHANNEL), inputs(5, 4)
    traced = torch.jit.trace(model, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert_close(torch.jit.load(file)(x), model(x))
    assert_close(outcome(traced, x), outcome(model, x))
    with pytest.raises(OrthoFxError, match=r"^TorchScript cannot compile TropicalActivation: use torch\.export"):
        torch.jit.script(model)


def test_ddp_and_fsdp_in_two_processes_equal_one(tmp_path):
    # As a module of the repository, so that the file finds the others of the tests.
    command = [sys.executable, "-m", "tests.ortho_fx.rewriting.test_interoperability", str(tmp_path / "store")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    root = Path(__file__).parents[3]
    processes = [subprocess.Popen([*command, str(rank)], cwd=root, **pipes) for rank in range(2)]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


def one_of_two(store, rank):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for config in (*CONFIGS[:2], *CONFIGS[-2:]):
        check_wrappers(config, rank)
    check_ddp(LAYER, rank, lambda model: torch.compile(model, backend="aot_eager"))
    # A process that ends closes its connections, which gloo's threads in the other process may still use.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    leave(0)


def check_ddp(config, rank, wrap):
    model, x = rewritten(config), inputs(6, 4)
    reference = copy.deepcopy(model)
    reference(x).square().mean().backward()
    wrapped = wrap(nn.parallel.DistributedDataParallel(model))
    wrapped(x.chunk(2)[rank]).square().mean().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


def check_wrappers(config, rank):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    check_ddp(config, rank, lambda model: model)
    mesh, whole = init_device_mesh("cpu", (2,)), StateDictOptions(full_state_dict=True)
    model, x = rewritten(config), inputs(6, 4)
    reference = copy.deepcopy(model)
    before = copy.deepcopy(reference.state_dict())
    for module in (model.act, model):
        fully_shard(module, mesh=mesh)
    for network, batch in ((reference, x), (model, x.chunk(2)[rank])):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        network(batch).square().mean().backward()
        optimizer.step()
    assert_close(get_model_state_dict(model, options=whole), dict(reference.state_dict()))
    set_model_state_dict(model, copy.deepcopy(before), options=whole)
    assert_close(get_model_state_dict(model, options=whole), dict(before))

    with torch.device("meta"):
        built = Network().double()
        rewrite_(built, config, example_inputs=inputs(8, 4).to("meta"))
    for module in (built.act, built):
        fully_shard(module, mesh=mesh)
    built.to_empty(device="cpu")
    for module in built.modules():
        if isinstance(module, ExpansionActivation):
            module.reset_parameters()
    expected = rewritten_state(config)
    for name, value in built.act.state_dict().items():
        assert_close(value.full_tensor() if hasattr(value, "full_tensor") else value, expected[name])
    assert gains(built.act).forward == pytest.approx(1)


if __name__ == "__main__":
    one_of_two(sys.argv[1], int(sys.argv[2]))
