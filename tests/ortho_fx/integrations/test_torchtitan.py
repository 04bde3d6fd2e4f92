"""torchtitan with expansions: its own parallelisation, trainer, checkpoints and graph trainer, on CPUs.

Run as a script, this file is one process of some: `test_torchtitan.py CHECK FOLDER`, with torchrun's variables.
"""

import copy
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ortho_fx import ExpansionActivation, ExpansionConfig, OrthoFxError, freeze_, revert_, rewrite_
from ortho_fx.processes import leave
from ortho_fx.sharded import copy_whole_

pytest.importorskip("torchtitan")
pytestmark = pytest.mark.slow

VOCABULARY, LENGTH, BATCH = 2048, 32, 4
HERMITE = "hermite3"
OVERRIDE = "ortho_fx.integrations.torchtitan.expansions"


def import_trainer():
    """torchtitan's trainer imports a package of data sets, of which nothing is used here."""
    used = {"datasets": ("Dataset", "load_dataset"), "datasets.distributed": ("split_dataset_by_node",)}
    missing = importlib.util.find_spec("datasets") is None
    if missing:
        for name, members in used.items():
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(dict.fromkeys(members))
    import torchtitan.trainer

    if missing:
        for name in used:
            del sys.modules[name]
    return torchtitan.trainer


def use_cpus():
    """torchtitan asks for an accelerator when it is imported; its trainer asks it for its name and memory."""
    import torchtitan.tools.utils as tools

    def nothing(*arguments, **keywords):
        return None

    tools.device_type = "cpu"
    tools.device_module = types.SimpleNamespace(
        get_device_name=lambda device: "CPU",
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_properties=lambda device: types.SimpleNamespace(total_memory=1),
        memory_stats=lambda device: {},
        set_device=nothing,
        reset_peak_memory_stats=nothing,
        empty_cache=nothing,
        synchronize=nothing,
    )


def small_spec(expansion=HERMITE, layers=2):
    """The debug model with fewer layers, and attention that CPUs have a backward for."""
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry

    from ortho_fx.integrations.torchtitan import ExpansionConverter

    converters = [ExpansionConverter.Config(expansion=expansion)] if expansion else None
    spec = model_registry("debugmodel", converters=converters)
    spec.model.layers = spec.model.layers[:layers]
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec


def built(spec, device="cpu"):
    with torch.device("meta"):
        model = spec.model.build()
    model.verify_module_protocol()
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model


def expansions_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpansionActivation)}


def tokens(step=0, batch=BATCH, length=LENGTH):
    """Sequences that count in threes, which a model learns quickly: inputs and labels."""
    start = torch.randint(0, 100, (batch, 1), generator=torch.Generator().manual_seed(step))
    counted = (start + 3 * torch.arange(length + 1)) % 100
    return counted[:, :-1].contiguous(), counted[:, 1:].contiguous()


def loss_function():
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.config import CompileConfig

    return CrossEntropyLoss.Config(global_vocab_size=VOCABULARY).build(compile_config=CompileConfig())


def error_of(call, *arguments, **keywords):
    with pytest.raises(OrthoFxError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


# One process.


@pytest.mark.parametrize("expansion", [HERMITE, "fourier", "tropical", "tropical_rational"])
def test_a_config_builds_what_rewrite_makes(expansion):
    model = built(small_spec(expansion))
    plain = built(small_spec(None))
    report = rewrite_(plain, expansion)
    assert [site.name for site in report.replaced] == list(expansions_of(model))
    assert expansions_of(model).keys() == {f"layers.{n}.feed_forward.silu_expansion_0" for n in range(2)}
    assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    inputs, _ = tokens()
    assert torch.equal(model(inputs), plain(inputs))


def test_the_override_builds_it_in_the_trainers_config():
    from torchtitan.config.override import OverrideConfig, apply_overrides, parse_cli_imports

    settings = {"expansion": {"layers.0.*": {"basis": "fourier", "degree": 2}, "*": None}, "targets": ["silu"]}
    imports = parse_cli_imports([f"{OVERRIDE}={json.dumps(settings)}"])
    config = import_trainer().Trainer.Config(model_spec=small_spec(None), override=OverrideConfig(imports=imports))
    model_config = config.model_spec.model  # the trainer looks it up before the overrides
    apply_overrides(config.override, config)
    copied = copy.deepcopy(model_config)
    for one in (model_config, copied):
        with torch.device("meta"):
            found = expansions_of(one.build())
        assert {name: str(module.config) for name, module in found.items()} == {
            "layers.0.feed_forward.silu_expansion_0": "fourier 2"
        }
    written = config.to_dict()["model_spec"]["model"]["expansions"]
    assert written == {"layers.0.*": ExpansionConfig("fourier", 2).to_dict(), "*": None}


def test_the_build_may_be_in_half_precision():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = built(small_spec())
    finally:
        torch.set_default_dtype(torch.float32)
    for module in expansions_of(model).values():
        assert module.coefficients.dtype == torch.bfloat16
        assert_close(
            module.coefficients.float(),
            built(small_spec()).layers["0"].feed_forward.silu_expansion_0.coefficients,
            rtol=4e-3,
            atol=0,
        )


def test_prepared_expansions_are_what_they_were():
    from ortho_fx.integrations.torchtitan import prepare_

    model = built(small_spec())
    assert prepare_(model) is model
    (name, module), *_ = expansions_of(model).items()
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module)
        assert repr(copied) == "HermiteActivation(degree=3, init='stable')"
        assert_close(copied.state_dict(), module.state_dict())
    inputs, _ = tokens()
    expected = model(inputs)
    frozen = copy.deepcopy(model)
    freeze_(frozen)
    assert_close(frozen(inputs), expected)
    assert name in revert_(model).names
    assert not expansions_of(model)
    assert_close(model.state_dict(), built(small_spec(None)).state_dict())


def test_what_cannot_be_built_is_refused():
    from ortho_fx.integrations.torchtitan import ExpansionConverter, expansions, prepare_

    def converted(**settings):
        return ExpansionConverter.Config(**settings).build().convert(small_spec(None).model)

    assert error_of(converted, expansion={"init": "calibrated"}) == (
        "init 'calibrated' measures inputs, and torchtitan builds the model on the meta device: choose init 'stable', "
        "and call calibrate_(trainer.model_parts[0], batches) before the training"
    )
    assert error_of(converted, expansion={"layers.0.*": {"granularity": "channel"}}) == (
        "granularity 'channel' needs the channels of each site, which torchtitan's build does not know: choose "
        "granularity 'layer'"
    )
    one_a_model = (
        "granularity 'model' shares one expansion over all blocks, and torchtitan shards each block by itself: choose "
        "granularity 'layer'"
    )
    assert error_of(converted, expansion={"granularity": "model"}) == one_a_model
    assert error_of(converted, expansion="hermitian").startswith("basis must be one of hermite, ")
    assert error_of(converted(targets=["relu"]).build).startswith("no activation of Llama3Model can be replaced: ")
    assert error_of(expansions, small_spec().model) == (
        "the config of Llama3Model builds expansions already: ask for them once, by the override or by the converter"
    )
    model = built(small_spec(None))
    assert error_of(prepare_, model) == "Llama3Model holds no expansion: call rewrite_ first"
    rewrite_(model, ExpansionConfig(granularity="model"))
    assert error_of(prepare_, model) == one_a_model
    revert_(model)
    rewrite_(model, ExpansionConfig(granularity="channel"), example_inputs=tokens()[0])
    assert error_of(prepare_, model) == (
        "layers.0.feed_forward.silu_expansion_0 has granularity 'channel': torchtitan distributes the channels, and "
        "every process would need the expansions of its own: choose granularity 'layer'"
    )


def test_experts_that_are_distributed_are_refused():
    from torchtitan.models.qwen3 import model_registry

    from ortho_fx.integrations.torchtitan import expansions

    config = model_registry("debugmodel_moe").model
    with torch.device("meta"):
        model = expansions(config).build()
    model.verify_module_protocol()
    name, module = next(iter(expansions_of(model).items()))
    assert error_of(module.parallelize, types.SimpleNamespace(tp=1, ep=2)) == (
        f"{name} is inside of experts, whose tokens torchtitan distributes in another way: leave it out by its name, "
        '{"*.routed_experts.*": None, "*": ...}, or take neither tensor nor expert parallelism'
    )


def test_weights_of_hugging_face_keep_the_start_of_the_coefficients():
    spec = small_spec({"basis": "fourier", "init": "fit"})
    model = built(spec)
    adapter = spec.state_dict_adapter(spec.model, None)
    files = adapter.to_hf(model.state_dict())
    assert not any("silu" in key for key in files)
    start = {name: copy.deepcopy(module.state_dict()) for name, module in expansions_of(model).items()}
    assert model.load_state_dict(adapter.from_hf(files), strict=False).missing_keys
    for name, module in expansions_of(model).items():
        assert_close(module.state_dict(), start[name], rtol=0, atol=0)
        x = torch.linspace(-3, 3, 50)
        assert_close(module(x), torch.nn.functional.silu(x), rtol=0, atol=1e-2)


def test_a_checkpoint_without_coefficients_is_not_loaded_silently(tmp_path):
    from torch.distributed import checkpoint

    checkpoint.save(built(small_spec(None)).state_dict(), checkpoint_id=tmp_path / "plain")
    with pytest.raises(checkpoint.CheckpointException, match="Missing key in checkpoint state_dict"):
        checkpoint.load(built(small_spec()).state_dict(), checkpoint_id=tmp_path / "plain")


def test_the_example_as_far_as_it_needs_no_gpu(capsys):
    import_trainer()
    path = Path(__file__).parents[3] / "examples" / "torchtitan_llama.py"
    specification = importlib.util.spec_from_file_location("examples_torchtitan_llama", path)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    example.main(["--dry-run", "--expansion", "fourier5", "--tensor-parallel", "2"])
    counts = json.loads(capsys.readouterr().out)["parameters"]
    assert counts["expansions"] == counts["silu"] + 6 * ExpansionConfig("fourier", 5).size

    falling = {step: 5.0 - step for step in range(1, 5)}
    good = {"silu": falling, "expansions": falling, "resumed": {3: 2.0, 4: 1.001}}
    example.check(good, 4)
    for run, losses, told in (
        ("silu", {**falling, 3: float("nan")}, "silu: losses must be finite and fall; they went from 4.0 to 1.0"),
        ("expansions", {**falling, 4: 4.0}, "expansions: losses must be finite and fall; they went from 4.0 to 4.0"),
        ("resumed", falling, "the resumed run must start after step 2; its steps are [1, 2, 3, 4]"),
        ("resumed", {3: 2.0, 4: 1.1}, "after the resume, the losses differ by 1.0e-01 of them"),
    ):
        with pytest.raises(SystemExit) as caught:
            example.check({**good, run: losses}, 4)
        assert str(caught.value) == told


def traced(model, loss_of, *inputs):
    import_trainer()
    from torchtitan.experiments.graph_trainer.make_fx_tracer import minimal_fx_tracer
    from torchtitan.experiments.graph_trainer.trainer import make_fwd_bwd_step

    return minimal_fx_tracer(make_fwd_bwd_step(model, loss_of), module=model)(*inputs, {})


def test_the_graph_trainers_trace_of_a_step_computes_what_eager_does():
    from torchtitan.experiments.graph_trainer.make_fx_tracer import run_traced

    from ortho_fx.passes import pipeline

    loss_of = loss_function()
    inputs, labels = tokens()
    step = (inputs, labels, torch.tensor(float(labels.numel())))
    model = built(small_spec())
    loss, _ = loss_of(model(inputs), *step[1:])
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}

    # The rewrite before the trace.
    found, *gradients = run_traced(traced(model, loss_of, *step), module=model)(*step, {})
    assert torch.equal(found, loss)
    assert_close(gradients, list(expected.values()), rtol=0, atol=0)

    # The rewrite of the trace: the coefficients are the graph's own, and their gradients are further outputs.
    plain = built(small_spec(None))
    graph = traced(plain, loss_of, *step).gm
    record = pipeline.run(graph, ExpansionConfig.of(HERMITE))
    assert record.gradients == ("silu_expansion.coefficients", "silu_1_expansion.coefficients")
    state = {**dict(plain.named_parameters(remove_duplicate=False)), **dict(plain.named_buffers())}
    found, *gradients = graph(*state.values(), *step)
    names = [*dict(plain.named_parameters()), *(name for name in expected if "silu" in name)]
    assert torch.equal(found, loss)
    assert_close(gradients, [expected[name] for name in names], rtol=0, atol=0)


# Several processes.


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def summed_by_gloo(model):
    """torchtitan asks fully_shard for sums with a factor, which gloo does not have."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def check_gradients(folder, expansion, backend, sequence_parallel="False", **degrees):
    """torchtitan's parallelisation of a model with expansions, beside the model in one process."""
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims, full_dtensor, utils
    from torchtitan.distributed.spmd_types import annotate_input_spmd_types
    from torchtitan.models.llama3.sharding import set_llama3_sharding_config

    inputs, labels = tokens()
    count, loss_of = torch.tensor(float(labels.numel())), loss_function()
    alone = built(small_spec(expansion))
    loss, _ = loss_of(alone(inputs), labels, count)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}

    parallelism = ParallelismConfig(
        spmd_backend=backend,
        enable_sequence_parallel=sequence_parallel == "True",
        **{name: int(degree) for name, degree in degrees.items()},
    )
    dims = ParallelDims.from_config(parallelism, torch.distributed.get_world_size())
    dims.build_mesh()
    utils.set_spmd_backend(backend)
    spec = small_spec(expansion)
    set_llama3_sharding_config(spec.model, enable_sp=parallelism.enable_sequence_parallel)
    with torch.device("meta"):
        model = spec.model.build()
    spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=TrainingConfig(seq_len=LENGTH, mixed_precision_param="float32"),
        parallelism=parallelism,
        compile_config=CompileConfig(),
        ac_config=None,
        dump_folder=folder,
    )
    summed_by_gloo(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights()
    for name, module in expansions_of(model).items():  # started in the same way, whatever the distribution
        for key, tensor in module.state_dict().items():
            assert_close(full(tensor), alone.state_dict()[f"{name}.{key}"], rtol=0, atol=0)
    with torch.no_grad():  # on CPUs DTensors draw other random numbers
        for name, parameter in alone.named_parameters():
            copy_whole_(model.get_parameter(name), parameter)

    if dims.dp_enabled:
        batch = dims.get_mesh("batch")
        inputs, labels = (x.chunk(batch.size())[batch.get_local_rank()] for x in (inputs, labels))
    if backend == "full_dtensor":
        inputs, labels, _ = full_dtensor.parallelize_inputs(dims, inputs, labels, {})
    elif backend == "spmd_types":
        inputs, labels, _ = annotate_input_spmd_types(dims, inputs, labels, {})
    with utils.get_spmd_context(parallel_dims=dims)():
        found, _ = loss_of(model(inputs), labels, count)
        found.backward()
    found = full(found).detach()
    if dims.dp_enabled and backend != "full_dtensor":
        torch.distributed.all_reduce(found)
    assert_close(found, loss.detach())
    for name, parameter in model.named_parameters():
        assert_close(full(parameter.grad), expected[name], rtol=1e-4, atol=1e-5, msg=name)


def check_training(folder, run, steps, **changes):
    """torchtitan's trainer from the first step to the last; its losses go into the folder."""
    trainer_module = import_trainer()
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config.override import parse_cli_imports
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    class Counting(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config, *, dp_world_size, dp_rank, local_batch_size, **others):
            self.processes, self.rank, self.rows, self.step = dp_world_size, dp_rank, local_batch_size, 0

        def __iter__(self):
            while True:
                self.step += 1
                own = (x.chunk(self.processes)[self.rank].split(self.rows) for x in tokens(self.step))
                for inputs, labels in zip(*own, strict=True):
                    yield {"input": inputs}, labels

        def state_dict(self):
            return {"step": self.step}

        def load_state_dict(self, state):
            self.step = state["step"]

    class NoText(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config, **others):
            pass

        encode = decode = None

        def get_vocab_size(self):
            return VOCABULARY

    trainer_module.dist_utils.set_pg_timeouts = lambda **keywords: None  # a barrier by devices
    config = llama3_debugmodel()
    config.model_spec = small_spec(None)
    config.override.imports = parse_cli_imports([f'{OVERRIDE}={{"expansion": "{HERMITE}"}}'])
    config.tokenizer, config.dataloader = NoText.Config(), Counting.Config()
    config.dump_folder = f"{folder}/{run}"
    config.validator.enable = config.debug.enable_structured_logging = False
    config.training.steps, config.training.seq_len = int(steps), LENGTH
    config.training.mixed_precision_param = "float32"
    config.training.disable_cuda_graphs = True
    config.lr_scheduler.total_steps = 20
    config.parallelism.pipeline_parallel_schedule = "1F1B"
    config.optimizer.implementation = "for-loop"
    config.checkpoint.enable = True
    config.checkpoint.interval, config.checkpoint.keep_latest_k = 10, 0
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, type(getattr(getattr(config, section), key) or "")(value))
    world = int(os.environ["WORLD_SIZE"])
    shared = config.parallelism.tensor_parallel_degree * config.parallelism.pipeline_parallel_degree
    config.training.local_batch_size = BATCH * shared // world

    trainer = trainer_module.Trainer(config)
    if config.checkpoint.create_seed_checkpoint:
        trainer.checkpointer.save(curr_step=0, last_step=True)
        return
    for part in trainer.model_parts:
        summed_by_gloo(part)
    losses = {}
    trainer.metrics_processor.log = lambda step, loss, *others, **more: losses.update({step: float(loss)})
    trainer.train()
    if torch.distributed.get_rank() == world - 1:
        Path(f"{folder}/{run}.json").write_text(json.dumps(losses))
    trainer.close()


def processes(number, folder, check, *settings):
    """Runs a check in this many processes; `settings` are its arguments, those with = by name."""
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    environment = {**os.environ, "WORLD_SIZE": str(number), "STORE": str(store), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, check, str(folder), *settings],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(number)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * number, "\n".join(outputs)


@pytest.mark.parametrize(
    "settings",
    [
        (HERMITE, "spmd_types", "data_parallel_shard_degree=2"),
        (HERMITE, "spmd_types", "tensor_parallel_degree=2"),
        ("tropical", "spmd_types", "tensor_parallel_degree=2", "sequence_parallel=True"),
        (HERMITE, "partial_dtensor", "tensor_parallel_degree=2"),
        ("tropical", "partial_dtensor", "data_parallel_shard_degree=2"),
        (HERMITE, "full_dtensor", "data_parallel_shard_degree=2"),
        ("tropical", "full_dtensor", "tensor_parallel_degree=2", "sequence_parallel=True"),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_two_processes_have_the_gradients_of_one(tmp_path, settings):
    processes(2, tmp_path, "gradients", *settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one start, and the losses of 20 steps of one process from there."""
    folder = tmp_path_factory.mktemp("torchtitan")
    processes(1, folder, "training", "seed", "1", "checkpoint__create_seed_checkpoint=True")
    processes(1, folder, "training", "alone", "20", f"checkpoint__initial_load_path={folder}/seed/checkpoint/step-0")
    return folder


def losses_of(folder, run):
    return {int(step): loss for step, loss in json.loads((folder / f"{run}.json").read_text()).items()}


@pytest.fixture(scope="module", params=["data_parallel_shard", "tensor_parallel", "pipeline_parallel"])
def parallel(request, trained):
    """The name of a run of two processes, which trained from the same start, and what starts it with fewer steps."""

    def start(steps):
        settings = f"checkpoint__initial_load_path={trained}/seed/checkpoint/step-0", f"parallelism__{name}_degree=2"
        processes(2, trained, "training", name, str(steps), *settings)

    name = request.param
    start(20)
    return name, start, losses_of(trained, name)


def test_two_processes_train_as_one_does(trained, parallel):
    alone, (_, _, together) = losses_of(trained, "alone"), parallel
    assert list(together) == list(range(1, 21))
    assert_close(torch.tensor(list(together.values())), torch.tensor(list(alone.values())), rtol=1e-4, atol=0)
    assert together[20] < 0.5 * together[1]


def test_a_checkpoint_resumes_with_the_same_losses(trained, parallel):
    name, start, together = parallel
    (trained / name / "checkpoint" / "step-20").rename(trained / name / "later")
    start(14)
    assert losses_of(trained, name) == {step: together[step] for step in range(11, 15)}


if __name__ == "__main__":
    check, folder, *settings = sys.argv[1:]
    use_cpus()
    torch.set_num_threads(1)
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the group
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=120),
    )
    named = dict(setting.split("=", 1) for setting in settings if "=" in setting)
    globals()[f"check_{check}"](folder, *(setting for setting in settings if "=" not in setting), **named)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    leave(0)
