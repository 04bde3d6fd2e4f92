"""Expansions on several processes: each gives what one process gives, or an error that says what to do.

Run as a script, this file is one of two processes: `test_processes.py STORE RANK CHECK`.
"""

import copy
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from ortho_fx import (
    Annealing,
    ExpansionConfig,
    HermiteActivation,
    OrthoFxError,
    calibrate_,
    freeze_,
    param_groups,
    rewrite_,
)
from ortho_fx.errors import OperandError
from ortho_fx.processes import leave

pytestmark = pytest.mark.slow

LAYER = ExpansionConfig("hermite", 3)
ONE = replace(LAYER, granularity="model")
CHANNEL = ExpansionConfig("tropical_rational", 3, granularity="channel", clamp=1.5)
GROUP = ExpansionConfig("fourier", 2, granularity="group:3")


class MLP(nn.Module):
    def __init__(self, wide=6):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, wide), nn.GELU(), nn.Linear(wide, 4)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rewritten(config=LAYER, wide=6, blocks=0):
    """A network, or a sequence of them, whose expansions and those of their channels are all different."""
    torch.manual_seed(0)
    model = (nn.Sequential(*(MLP(wide) for _ in range(blocks))) if blocks else MLP(wide)).double()
    rewrite_(model, config, example_inputs=inputs(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def outcome(model, x):
    """Output, and the gradients of the input and the parameters, whole."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    full(y).square().sum().backward()
    return full(y).detach(), full(x.grad), {name: full(p.grad) for name, p in model.named_parameters()}


def mesh(*sizes, names=None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes or (2,), mesh_dim_names=names)


def plan(**more):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"up": ColwiseParallel(), "down": RowwiseParallel(), **more}


def error_of(call, *arguments, **keywords):
    with pytest.raises(OrthoFxError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


def check_statistics_are_of_all_ranks(rank):
    from torch.nn.parallel import DistributedDataParallel

    everything = (1 + torch.arange(600, dtype=torch.float64).remainder(2))[:, None] * inputs(600, 4)
    own = everything[rank::2]
    for init in ("stable", "fit"):
        config = ExpansionConfig("hermite", 3, init)
        alone, model = rewritten(config), rewritten(config)
        expected = calibrate_(alone, [everything], process_group="alone")
        measured = calibrate_(DistributedDataParallel(model), [own])
        assert measured.sites[0].samples == expected.sites[0].samples
        tolerance = 1e-12 if init == "stable" else 1e-3  # a histogram's bins
        assert_close(model.act.coefficients, alone.act.coefficients, rtol=tolerance, atol=tolerance)
        assert_same_on_all_ranks(model)

        # One of them saw nothing.
        model = rewritten(config)
        calibrate_(model, [everything] if rank else [])
        assert_close(model.act.coefficients, alone.act.coefficients, rtol=1e-12, atol=1e-12)

    for init in ("fit", "calibrated"):
        torch.manual_seed(0)
        model = MLP().double()
        rewrite_(model, ExpansionConfig("hermite", 3, init, "channel"), example_inputs=own)
        assert_same_on_all_ranks(model)
        torch.manual_seed(0)
        lonely = MLP().double()
        rewrite_(lonely, ExpansionConfig("hermite", 3, init), example_inputs=own, process_group="alone")
        first, other = gathered(lonely.act.coefficients)
        assert not torch.equal(first, other)
    torch.manual_seed(0)
    model = MLP().double()
    Annealing(model, batches=[own], steps=2)
    assert_same_on_all_ranks(model)


def gathered(tensor):
    found = [torch.empty_like(tensor) for _ in range(2)]
    torch.distributed.all_gather(found, tensor.detach().contiguous())
    return found


def assert_same_on_all_ranks(model):
    for tensor in (*model.parameters(), *model.buffers()):
        first, other = gathered(tensor)
        assert torch.equal(first, other)


def check_one_rank_that_fails_or_differs_is_told_by_all(rank):
    model = rewritten()
    before = copy.deepcopy(model.state_dict())
    if rank:
        assert "was called with NoneType and raised TypeError: linear()" in error_of(calibrate_, model, [None])
    else:
        message = error_of(calibrate_, model, [inputs(8, 4)])
        assert message.startswith("process 1 of the group could not run its inputs: OrthoFxError: MLP was called with")
    wide = nn.Sequential(rewritten(), rewritten()) if rank else rewritten()
    message = error_of(calibrate_, wide, [inputs(8, 4)])
    assert message == (
        "processes 0 and 1 hold different sites (0.act, 1.act, act), and cannot measure together: pass process_group=, "
        "those that hold the same model, or 'alone'"
    )
    message = error_of(calibrate_, model, [inputs(8, 4)], process_group="mine")
    assert message == "process_group must be a ProcessGroup, None or 'alone'; got 'mine'"
    assert_close(model.state_dict(), before)


class Doubled(nn.Module):
    def forward(self, parameter):
        return 2 * parameter

    def right_inverse(self, value):
        return value / 2


def check_values_go_into_sharded_parameters(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    x = 3 * inputs(64, 4)
    for config in (LAYER, CHANNEL):
        for parametrized in (False, True):
            for wrap in ((), ("act",), ("up", "act")):
                model, alone = rewritten(config), rewritten(config)
                for network in (model, alone):
                    if parametrized:
                        name = next(name for name, _ in network.act.named_parameters())
                        parametrize.register_parametrization(network.act, name, Doubled())
                calibrate_(alone, [x])
                for name in wrap:
                    fully_shard(model.get_submodule(name), mesh=mesh())
                fully_shard(model, mesh=mesh())
                model(x).sum().backward()  # the root's parameters stay gathered
                model.zero_grad()
                calibrate_(model, [x])
                model(x).sum().backward()
                assert_close(model(x), alone(x))
                for (name, parameter), other in zip(model.named_parameters(), alone.parameters(), strict=True):
                    assert_close(full(parameter), other, msg=name)
    for original in (True, False):
        model, alone = rewritten(), rewritten()
        calibrate_(alone, [x])
        wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        wrapped(x).sum().backward()
        calibrate_(wrapped, [x])
        assert_close(wrapped(x), alone(x))


def check_freezing_of_sharded_parameters(rank):
    from torch.distributed.fsdp import fully_shard

    x = inputs(6, 4)
    for config in (LAYER, CHANNEL, GROUP):
        for wrap in ((), ("act",)):
            for called in (False, True):
                model = rewritten(config)
                expected = model(x)
                for name in wrap:
                    fully_shard(model.get_submodule(name), mesh=mesh())
                fully_shard(model, mesh=mesh())
                if called:
                    model(x).sum().backward()
                freeze_(model)
                assert_close(model(x), expected)
                model(x).sum().backward()
                assert not any(hasattr(buffer, "full_tensor") for buffer in model.buffers())


def check_an_activation_of_several_units(rank):
    from torch.distributed.fsdp import fully_shard

    def build(sharing):
        torch.manual_seed(0)
        model = nn.Sequential(MLP(), MLP()).double()
        model[1].act = model[0].act
        rewrite_(model, LAYER, sharing=sharing)
        return model

    model = build("instance")
    fully_shard(model[0], mesh=mesh())
    assert error_of(fully_shard, model[1], mesh=mesh()) == (
        "0.act: several of the modules that fully_shard wraps share it, and the first of them has sharded it: call "
        'rewrite_(model, config, sharing="site"), for each to have its own'
    )
    apart = nn.Sequential(MLP(), MLP()).double()
    rewrite_(apart, ONE)
    fully_shard(apart[0], mesh=mesh())
    assert error_of(fully_shard, apart[1], mesh=mesh()) == (
        "0.act: several of the modules that fully_shard wraps share it, and the first of them has sharded it: choose "
        "granularity 'layer', for each to have its own"
    )
    # Where one unit holds all places it works, as do separate expansions.
    for sharing, blocks in (("instance", False), ("site", True)):
        model, reference = build(sharing), build(sharing)
        for block in model if blocks else ():
            fully_shard(block, mesh=mesh())
        fully_shard(model, mesh=mesh())
        expected, actual = outcome(reference, inputs(6, 4)), outcome(model, inputs(6, 4))
        assert_close(actual, expected)


def check_a_call_around_fully_shard_is_refused(rank):
    from torch.distributed.fsdp import fully_shard

    model = rewritten()
    fully_shard(model, mesh=mesh())
    with pytest.raises(OperandError, match=r"^act: coefficients is distributed over processes and its input is not\."):
        model.act(inputs(3, 6))


def check_models_that_are_wrapped_already_are_refused(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    told = "act would get parameters that no other process knows of, since {}: call rewrite_ before "
    advice = "DistributedDataParallel, fully_shard or parallelize_module"
    inside = nn.Sequential(MLP(), MLP())
    fully_shard(inside, mesh=mesh())
    cpu = torch.device("cpu")
    for model, prefix, held in (
        (DistributedDataParallel(MLP()), "module.", "the model is wrapped by DistributedDataParallel"),
        (
            FullyShardedDataParallel(MLP(), device_id=cpu),
            "_fsdp_wrapped_module.",
            "the model is wrapped by FullyShardedDataParallel",
        ),
        (nn.Sequential(fully_shard(MLP(), mesh=mesh())), "0.", "0 is wrapped by FSDPModule"),
        (inside[1], "", "up.weight is sharded"),
        (parallelize_module(MLP(), mesh(), plan()), "", "up.weight is sharded"),
    ):
        before = [type(module) for module in model.modules()]
        assert error_of(rewrite_, model) == prefix + told.format(held) + advice
        assert [type(module) for module in model.modules()] == before


def check_models_inside_of_a_wrapper_are_refused(rank):
    from torch.nn.parallel import DistributedDataParallel

    wrapped, free = DistributedDataParallel(nn.Sequential(MLP())), DistributedDataParallel(MLP()).module
    told = "act would get parameters that no other process knows of, since the model is inside of a "
    advice = "DistributedDataParallel: call rewrite_ before making it"
    assert error_of(rewrite_, wrapped.module) == f"0.{told}{advice}"
    assert error_of(rewrite_, wrapped.module[0]) == told + advice
    assert rewrite_(free).replaced


def check_tensor_parallelism(rank):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from ortho_fx.rewriting.parallel import ExpansionParallel

    for wide in (6, 9):  # 9 channels are divided into 5 and 4, which PyTorch does to DTensors only
        styles = plan(act=ExpansionParallel())
        if wide == 9:
            styles["up"] = ColwiseParallel(use_local_output=False)
        for config in (LAYER, ExpansionConfig("tropical", 3), CHANNEL, GROUP):
            reference = rewritten(config, wide)
            expected = outcome(reference, inputs(5, 4))
            # DTensors say by themselves how they are distributed.
            for local in (True, False) if wide == 6 else (False,):
                chosen = {**styles, "up": ColwiseParallel(use_local_output=local)}
                model = parallelize_module(rewritten(config, wide), mesh(), chosen)
                assert_close(outcome(model, inputs(5, 4)), expected)
            with torch.no_grad():
                calibrate_(reference, [inputs(64, 4)], process_group="alone")
                model = parallelize_module(rewritten(config, wide), mesh(), styles)
                calibrate_(model, [inputs(64, 4)])
                assert_close(model(inputs(5, 4)), reference(inputs(5, 4)), rtol=1e-6, atol=1e-6)
                freeze_(model)
                assert_close(model(inputs(5, 4)), reference(inputs(5, 4)), rtol=1e-6, atol=1e-6)
                freeze_(reference)
                frozen = parallelize_module(copy.deepcopy(reference), mesh(), styles)
                assert_close(frozen(inputs(5, 4)), reference(inputs(5, 4)))

    # One expansion for two blocks.
    styles = {f"{block}.{key}": one for block in range(2) for key, one in plan(act=ExpansionParallel()).items()}
    model = parallelize_module(rewritten(ONE, blocks=2), mesh(), styles)
    assert model[0].act is model[1].act
    assert_close(outcome(model, inputs(5, 4)), outcome(rewritten(ONE, blocks=2), inputs(5, 4)))

    # Replicated inputs: each process has the whole gradient.
    expected = outcome(rewritten(), inputs(5, 4))
    whole = plan(act=ExpansionParallel(input_layouts=Replicate()))
    whole["up"] = ColwiseParallel(output_layouts=Replicate())
    whole["down"] = RowwiseParallel(input_layouts=Replicate())
    model = parallelize_module(rewritten(), mesh(), whole)
    assert_close(outcome(model, inputs(5, 4)), expected)

    # Sequence parallelism: each process has some of the rows.
    for config in (LAYER, CHANNEL):
        expected = outcome(rewritten(config), inputs(2, 6, 4))
        for local in (True, False):
            model = parallelize_module(
                rewritten(config),
                mesh(),
                {
                    "up": ColwiseParallel(output_layouts=Shard(1), use_local_output=local),
                    "act": ExpansionParallel(input_layouts=Shard(1)),
                    "down": RowwiseParallel(input_layouts=Shard(1)),
                },
            )
            assert_close(outcome(model, inputs(2, 6, 4)), expected)

    # Sums that are still to be made come before what is not linear.
    model = parallelize_module(rewritten(), mesh(), {"act": ExpansionParallel()})
    assert_close(model.act(sum_of_parts(inputs(3, 6))).full_tensor(), rewritten().act(inputs(3, 6)))

    model = parallelize_module(rewritten(), mesh(), {**plan(), "up": ColwiseParallel(use_local_output=False)})
    assert error_of(model, inputs(5, 4)) == (
        "act got mixed torch.Tensor and DTensor: its input is a DTensor and coefficients is none. Put "
        "ortho_fx.rewriting.parallel.ExpansionParallel() for it into the plan of parallelize_module"
    )


def sum_of_parts(x):
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(x / 2, mesh(), [Partial()])


def check_tensor_parallelism_with_others(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    from ortho_fx.rewriting.parallel import ExpansionParallel

    # With fully_shard in another dimension of the mesh, and optimizers that see one kind of parameter.
    for config in (LAYER, CHANNEL):
        reference, both = rewritten(config), mesh(1, 2, names=("data", "tensor"))
        model = parallelize_module(rewritten(config), both["tensor"], plan(act=ExpansionParallel()))
        fully_shard(model, mesh=both["data"])
        for network in (reference, model):
            optimizer = torch.optim.AdamW(param_groups(network, lr=0.1), foreach=True)
            for _ in range(3):
                network(inputs(5, 4)).square().sum().backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert_close(full(parameter), other, msg=name)
    compiled = parallelize_module(rewritten(CHANNEL), mesh(), plan(act=ExpansionParallel()))
    expected = outcome(rewritten(CHANNEL), inputs(5, 4))
    compiled.compile(backend="aot_eager")
    assert_close(outcome(compiled, inputs(5, 4)), expected)


def check_fully_shard_over_a_dimension_of_the_tensors_mesh(rank):
    """All tensors are DTensors of one mesh, and fully_shard sums over its data dimension whatever comes."""
    import torch.distributed.fsdp as fsdp
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    if not hasattr(fsdp, "DataParallelMeshDims"):  # a release that cannot do this
        return
    x, both = inputs(6, 4), mesh(2, 1, names=("data", "tensor"))
    for config in (LAYER, CHANNEL):
        _, _, expected = outcome(rewritten(config), x)
        model = distribute_module(rewritten(config), both)
        fsdp.fully_shard(model, mesh=both, dp_mesh_dims=fsdp.DataParallelMeshDims(shard="data"))
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        model(distribute_tensor(x, both, [Shard(0), Replicate()])).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert_close(full(parameter.grad), expected[name], msg=name)


def check_plans_without_the_expansions_are_refused(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import parallelize_module

    from ortho_fx.rewriting.parallel import ExpansionParallel

    told = (
        "act: its neighbour up.weight is parallel over processes, so its input may be a part of a tensor, and the "
        "gradient of its coefficients would miss the others. Put ortho_fx.rewriting.parallel.ExpansionParallel() for "
        "it into the plan of parallelize_module, or ExpansionParallel(input_layouts=Replicate()) where every process "
        "has the whole input"
    )
    called = rewritten()
    called(inputs(5, 4))  # before it is parallel, nothing is to be said
    for model in (called, rewritten(), copy.deepcopy(called)):
        parallelize_module(model, mesh(), plan())
        assert error_of(model, inputs(5, 4)) == told
        with torch.no_grad():  # nothing is summed up
            assert_close(model(inputs(5, 4)), rewritten()(inputs(5, 4)))
    torch.compiler.reset()
    assert told in error_of(torch.compile(model, backend="eager"), inputs(5, 4))

    class Own(nn.Module):  # an expansion that no rewrite put there
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
            self.act = HermiteActivation()

        def forward(self, x):
            return self.down(self.act(self.up(x)))

    assert error_of(parallelize_module(Own(), mesh(), plan()), inputs(5, 4).float()) == told.replace(
        "act", "HermiteActivation", 1
    )

    # What fully_shard shards is not parallel in that sense.
    for units in (("up", "down"), ("up",), ()):
        model = rewritten()
        for name in units:
            fully_shard(model.get_submodule(name), mesh=mesh())
        fully_shard(model, mesh=mesh())
        assert_close(outcome(model, inputs(5, 4)), outcome(rewritten(), inputs(5, 4)))
    both = mesh(1, 2, names=("data", "tensor"))
    model = parallelize_module(rewritten(), both["tensor"], plan())
    for name in ("up", "down"):
        fully_shard(model.get_submodule(name), mesh=both["data"])
    assert error_of(model, inputs(5, 4)) == told.replace("up", "down", 1)  # the first keeps its weight gathered

    assert error_of(parallelize_module, rewritten(), mesh(), {"up": ExpansionParallel()}) == (
        "ExpansionParallel is for expansions; got Linear: call rewrite_ first"
    )
    assert error_of(ExpansionParallel, input_layouts="rows") == (
        "input_layouts must be Shard(dim) or Replicate(); got 'rows'"
    )
    assert repr(ExpansionParallel(input_layouts=Shard(1))) == "ExpansionParallel(input_layouts=Shard(dim=1))"
    assert repr(ExpansionParallel(input_layouts=Replicate())) == "ExpansionParallel(input_layouts=Replicate())"


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(tmp_path, check):
    command = [sys.executable, __file__, str(tmp_path / "store")]
    processes = [
        subprocess.Popen([*command, str(rank), check], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def one_of_two(store, rank, check):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    CHECKS[check](rank)
    # A process that leaves takes its connections along, and gloo's threads in the other one may still be using them.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    one_of_two(sys.argv[1], int(sys.argv[2]), sys.argv[3])
