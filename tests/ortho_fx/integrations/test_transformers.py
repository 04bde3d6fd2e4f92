import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ortho_fx import (
    ExpansionActivation,
    ExpansionConfig,
    OrthoFxError,
    expansion_config,
    find_sites,
    freeze_,
    revert_,
    rewrite_,
    rewrite_like_,
    save_expansions,
)
from ortho_fx.bases import BASES, HERMITE

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("ortho_fx.integrations.transformers")
integration.enable()

# The name of the argument was longer.
DTYPE = "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = {"input_ids": torch.arange(16).view(2, 8)}


def llama(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **SIZES, **settings)
    return transformers.LlamaForCausalLM(config).eval(), TOKENS


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval(), TOKENS


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=32, **SIZES)
    return transformers.BertForMaskedLM(config).eval(), TOKENS


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **SIZES)
    return transformers.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}


MODELS = {
    llama: transformers.AutoModelForCausalLM,
    gpt2: transformers.AutoModelForCausalLM,
    bert: transformers.AutoModelForMaskedLM,
    vit: transformers.AutoModelForImageClassification,
}


def learned(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ExpansionActivation):
                for parameter in module.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def a_layer(model, batch):
    rewrite_(model, "hermite3")


def a_channel(model, batch):
    rewrite_(model, ExpansionConfig("fourier", 3, granularity="channel", clamp=3.0), example_inputs=batch)


def frozen_a_channel(model, batch):
    a_channel(model, batch)
    freeze_(learned(model))


def one_of_them(model, batch):
    rewrite_(model, {next(site.name for site in find_sites(model) if not site.reason): "tropical4"})


def twice(model, batch):
    one_of_them(model, batch)
    rewrite_(model, ExpansionConfig("fourier", 4, init="fit"))


def shared(model, batch):
    first, other = [site.name for site in find_sites(model) if not site.reason][:2]
    owner, _, key = other.rpartition(".")
    setattr(model.get_submodule(owner), key, model.get_submodule(first))
    rewrite_(model, "hermite3")


def reverted(model, batch):
    a_layer(model, batch)
    revert_(model)


FORMS = (a_layer, a_channel, frozen_a_channel, one_of_them, twice, shared, reverted)


def rewritten(make=llama, form=a_layer):
    model, batch = make()
    form(model, batch)
    return learned(model), batch


def saved(folder, make=llama, form=a_layer, **settings):
    model, batch = rewritten(make, form)
    model.save_pretrained(folder, **settings)
    return model, batch


def output(model, batch):
    with torch.no_grad():
        result = model(**batch)
    return result.logits if "logits" in result else result.last_hidden_state


def check_equal(again, model, batch):
    assert torch.equal(output(again, batch), output(model, batch))
    assert expansion_config(again) == expansion_config(model)
    for (name, value), (other, expected) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert (name, value.dtype) == (other, expected.dtype)
        assert torch.equal(value, expected), name


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change(folder, **values):
    config = config_of(folder)
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_round_trip(tmp_path, make, form):
    model, batch = saved(tmp_path, make, form)
    described = expansion_config(model)
    if described["sites"]:
        assert config_of(tmp_path)["quantization_config"].items() >= json.loads(json.dumps(described)).items()
    else:
        assert "quantization_config" not in config_of(tmp_path)
    check_equal(MODELS[make].from_pretrained(tmp_path), model, batch)
    check_equal(MODELS[make].from_pretrained(tmp_path).to(torch.bfloat16).float(), model.bfloat16().float(), batch)


def test_the_model_is_that_of_its_class(tmp_path):
    model, batch = saved(tmp_path)
    plain, _ = llama()
    assert not hasattr(model.config, "quantization_config")
    plain.save_pretrained(tmp_path / "plain")
    again = type(plain).from_pretrained(tmp_path)
    assert type(again) is type(plain)
    assert config_of(tmp_path)["architectures"] == ["LlamaForCausalLM"]
    expected = type(plain).from_pretrained(tmp_path / "plain").config
    again.config.name_or_path = expected.name_or_path
    assert again.config == expected
    assert not hasattr(again, "hf_quantizer")
    assert not getattr(again, "is_quantized", False)
    assert again.half().dtype == torch.float16
    copied = copy.deepcopy(type(plain).from_pretrained(tmp_path))
    copied.save_pretrained(tmp_path / "again")
    check_equal(type(plain).from_pretrained(tmp_path / "again"), model, batch)


def test_ways_to_load(tmp_path):
    model, batch = saved(tmp_path, max_shard_size="4KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    auto = transformers.AutoModelForCausalLM
    check_equal(auto.from_pretrained(tmp_path), model, batch)
    check_equal(auto.from_pretrained(tmp_path, config=transformers.AutoConfig.from_pretrained(tmp_path)), model, batch)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    check_equal(loaded, model, batch)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    fresh, _ = llama()
    rewrite_like_(fresh, tmp_path)
    assert expansion_config(fresh) == expansion_config(model)
    half = auto.from_pretrained(tmp_path, **{DTYPE: torch.bfloat16})
    half.save_pretrained(tmp_path / "half")
    check_equal(auto.from_pretrained(tmp_path / "half", **{DTYPE: "auto"}), half, batch)
    pytest.importorskip("accelerate")
    for where in ("cpu", "auto", {"": "cpu"}):
        check_equal(auto.from_pretrained(tmp_path, device_map=where), model, batch)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_base_of_a_head_and_a_head_of_the_base(tmp_path, make):
    model, batch = saved(tmp_path / "head", make)
    base = getattr(model, model.base_model_prefix)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert expansion_config(loaded) == expansion_config(base)
    assert torch.equal(output(loaded, batch), output(base, batch))
    base.save_pretrained(tmp_path / "base")
    headed = type(model).from_pretrained(tmp_path / "base")
    assert torch.equal(output(getattr(headed, model.base_model_prefix), batch), output(base, batch))


def test_another_head(tmp_path):
    """The activation of the head that is not loaded goes with that head."""
    model, batch = saved(tmp_path, bert)
    assert "cls.predictions.transform.transform_act_fn" in expansion_config(model)["sites"]
    other = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert expansion_config(other.bert) == expansion_config(model.bert)
    assert torch.equal(output(other.bert, batch), output(model.bert, batch))
    fewer = transformers.BertForMaskedLM.from_pretrained(tmp_path, num_hidden_layers=1)
    assert len(expansion_config(fewer)["sites"]) == 2


def test_sites_with_their_only_place_in_the_base():
    described = {"version": 1, "sites": {"act": {"basis": "hermite"}}, "shared": {"model.layers.0.mlp.act_fn": "act"}}
    base = llama()[0].model
    found = integration._for_model(described, base)
    assert found == {"version": 1, "sites": {"layers.0.mlp.act_fn": {"basis": "hermite"}}, "shared": {}}


def test_what_config_json_says_is_of_the_model_as_it_is(tmp_path):
    saved(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    revert_(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in config_of(tmp_path)
    fresh = transformers.LlamaForCausalLM(model.config)
    saved(tmp_path)
    fresh.config = transformers.AutoConfig.from_pretrained(tmp_path)
    fresh.save_pretrained(tmp_path / "fresh")
    assert "quantization_config" not in config_of(tmp_path / "fresh")
    assert fresh.config.quantization_config["quant_method"] == "ortho_fx"


def test_a_plain_checkpoint_is_rewritten_after_it_was_loaded(tmp_path):
    plain, batch = llama()
    plain.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    rewrite_(loaded, "hermite3")
    values = [parameter.clone() for parameter in loaded.parameters()]
    loaded.init_weights()
    rewrite_(plain, "hermite3")
    check_equal(loaded, plain, batch)
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), values, strict=True))


SOURCE = """
import sys, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    print(error)
"""


@pytest.mark.slow
def test_without_enable_the_error_names_it(tmp_path):
    saved(tmp_path)
    done = subprocess.run([sys.executable, "-c", SOURCE, tmp_path], capture_output=True, text=True, check=True)
    assert "install ortho_fx, and call ortho_fx.integrations.transformers.enable()" in done.stdout


def keep_tensors(folder, keep):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if keep(name)}, file, {"format": "pt"})


def test_checkpoints_that_do_not_fit(tmp_path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    saved(tmp_path)
    keep_tensors(tmp_path, lambda name: name != "model.layers.1.mlp.act_fn.coefficients")
    with pytest.raises(
        OrthoFxError, match=r"^the files lack values of the expansions at model\.layers\.1\.mlp\.act_fn"
    ):
        load(tmp_path)
    saved(tmp_path)
    config = config_of(tmp_path)
    config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OrthoFxError, match=r"at model\.layers\.0\.mlp\.act_fn, .*act_fn, which config\.json does not"):
        load(tmp_path)
    saved(tmp_path)
    change(tmp_path, version=2)
    with pytest.raises(OrthoFxError, match=r"has version 2; this release reads version 1: update ortho_fx$"):
        load(tmp_path)
    saved(tmp_path)
    change(tmp_path, sites={"model.layers.0.mlp.act_fn": {"basis": "stranger", "degree": 2}})
    with pytest.raises(
        OrthoFxError, match=r"^the checkpoint has the basis 'stranger' at model.* call ortho_fx\.register_basis before"
    ):
        load(tmp_path)
    saved(tmp_path)
    change(tmp_path, sites={"model.layers.0.mlp.no_such": {"basis": "hermite", "degree": 3}})
    with pytest.raises(OrthoFxError, match=r"^the model has no activation at model\.layers\.0\.mlp\.no_such"):
        load(tmp_path)
    saved(tmp_path)
    change(tmp_path, sites=3)
    with pytest.raises(OrthoFxError, match=r"^sites and shared must be maps"):
        load(tmp_path)


def test_parameters_of_other_modules_may_have_these_names(tmp_path):
    from safetensors.torch import load_file, save_file

    plain, batch = llama()
    plain.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.mlp.coefficients": torch.ones(4)}, file, {"format": "pt"})
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), plain, batch)


def test_models_that_are_quantized(tmp_path):
    model, _ = saved(tmp_path / "ours")
    with pytest.raises(OrthoFxError, match=r"^the checkpoint has expansions, and is loaded without"):
        type(model).from_pretrained(tmp_path / "ours", quantization_config=transformers.QuantoConfig(weights="int8"))
    model.config.quantization_config = transformers.QuantoConfig(weights="int8")
    with pytest.raises(
        OrthoFxError, match=r"^LlamaForCausalLM is quantized \(quanto\), .*save_expansions\(model, path"
    ):
        model.save_pretrained(tmp_path / "both")
    save_expansions(model, tmp_path / "expansions.safetensors")
    revert_(model)
    model.save_pretrained(tmp_path / "both")
    assert config_of(tmp_path / "both")["quantization_config"]["quant_method"] == "quanto"


def test_releases_that_are_too_old(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.50.3")
    with pytest.raises(OrthoFxError, match=r"^transformers is 4\.50\.3, and .* from 4\.53 on"):
        integration.enable()


def test_entries_of_other_methods_are_read_as_before(tmp_path):
    kinds = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    config = transformers.quantizers.auto.AutoQuantizationConfig.from_dict({"load_in_8bit": True})
    assert type(config) is transformers.BitsAndBytesConfig
    before = dict(kinds), transformers.PreTrainedModel.save_pretrained
    integration.enable()
    assert (kinds, transformers.PreTrainedModel.save_pretrained) == before


def test_activations_that_a_config_names(tmp_path):
    model, batch = llama(hidden_act="tropical_rational4")
    learned(model).save_pretrained(tmp_path)
    assert model.model.layers[0].mlp.act_fn.config == ExpansionConfig("tropical_rational", 4)
    assert config_of(tmp_path)["hidden_act"] == "tropical_rational4"
    assert "quantization_config" not in config_of(tmp_path)
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model, batch)
    freeze_(model)
    model.save_pretrained(tmp_path)
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model, batch)


@pytest.mark.parametrize("change", [lambda model: None, freeze_])
def test_another_expansion_than_the_config_names(tmp_path, change):
    model, batch = llama(hidden_act="hermite3")
    model.model.layers[1].mlp.act_fn = torch.nn.SiLU()
    rewrite_(model, ExpansionConfig("fourier", 3, granularity="channel"), example_inputs=batch)
    change(learned(model))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    check_equal(again, model, batch)
    again.save_pretrained(tmp_path)
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model, batch)
    revert_(again)
    assert again.model.layers[1].mlp.act_fn.config == ExpansionConfig("hermite", 3)


def test_names_of_bases_that_are_registered_later(monkeypatch):
    names = transformers.activations.ACT2FN
    monkeypatch.setitem(BASES, "another", HERMITE)
    known = set(names)
    integration.enable()
    added = set(names) - known
    for name in added:
        del names[name]
    assert {"another", "another1", "another32"} <= added


def test_expansions_that_a_config_names_and_no_file_has(tmp_path):
    plain, _ = llama()
    plain.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, hidden_act="hermite3")
    expected, _ = llama(hidden_act="hermite3")
    for one, other in zip(loaded.model.layers, expected.model.layers, strict=True):
        assert torch.equal(one.mlp.act_fn.coefficients, other.mlp.act_fn.coefficients)


def test_pipeline(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model, batch = saved(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(n): n for n in range(64)}, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0").save_pretrained(tmp_path)
    text = " ".join(map(str, batch["input_ids"][0].tolist()))
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), max_new_tokens=4, do_sample=False)
    expected = model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert pipe(text, return_tensors=True)[0]["generated_token_ids"] == expected[0].tolist()


# The Trainer


def rows():
    tokens = torch.randint(0, 64, (32, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_of(model, folder, cls=None, callbacks=(), optimizers=(None, None), eval_rows=None, **settings):
    pytest.importorskip("accelerate")
    if cls is None:
        cls = type("OurTrainer", (integration.ExpansionTrainerMixin, transformers.Trainer), {})
    ours = {
        name: settings.pop(name) for name in ("expansion_lr", "calibrate_batches", "log_expansions") if name in settings
    }
    values = {
        "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "weight_decay": 0.1,
    } | settings  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder), **values)
    return cls(
        model=model, args=arguments, train_dataset=rows(), eval_dataset=eval_rows, callbacks=list(callbacks),
        optimizers=optimizers, **ours,
    )  # fmt: skip


@pytest.mark.parametrize("rate", [None, 0.5])
@pytest.mark.parametrize("form", [a_layer, a_channel])
def test_the_optimizer_does_not_decay_expansions(tmp_path, form, rate):
    model, _ = rewritten(form=form)
    trainer = trainer_of(model, tmp_path, expansion_lr=rate)
    optimizer = trainer.create_optimizer()
    ours = {id(p) for m in model.modules() if isinstance(m, ExpansionActivation) for p in m.parameters()}
    seen = [id(one) for group in optimizer.param_groups for one in group["params"]]
    assert sorted(seen) == sorted({id(parameter) for parameter in model.parameters()})
    for group in optimizer.param_groups:
        here = {id(one) in ours for one in group["params"]}
        assert len(here) == 1 or rate is None
        if True in here:
            assert group["weight_decay"] == 0
            assert group["lr"] == (rate or 1e-2)
        elif group["params"][0].dim() > 1:
            assert group["weight_decay"] == 0.1
    trainer.create_scheduler(4)


def test_arguments_of_the_mixin(tmp_path):
    model, _ = llama()
    with pytest.raises(
        OrthoFxError, match=r"^expansion_lr is 0\.1, and AdamW has no parameters of expansions: call rewr"
    ):
        trainer_of(model, tmp_path, expansion_lr=0.1).create_optimizer()
    with pytest.raises(OrthoFxError, match=r"^expansion_lr must be a number, zero or more; got 'fast'$"):
        trainer_of(model, tmp_path, expansion_lr="fast")
    with pytest.raises(OrthoFxError, match=r"^calibrate_batches must be an integer, zero or more; got -1$"):
        trainer_of(model, tmp_path, calibrate_batches=-1)


@pytest.mark.slow
def test_training_is_calibrated_and_logged(tmp_path):
    model, _ = rewritten()
    before = model.model.layers[0].mlp.act_fn.coefficients.detach().clone()
    trainer = trainer_of(model, tmp_path, calibrate_batches=2, learning_rate=0.0, expansion_lr=0.1)
    trainer.train()
    statistics = trainer._expansions.calibration
    assert [site.name for site in statistics.sites] == list(expansion_config(model)["sites"])
    assert statistics.sites[0].samples == 2 * 4 * 8 * 32
    logged = [row for row in trainer.state.log_history if "loss" in row]
    changes = [row["expansions/model.layers.0.mlp.act_fn/change"] for row in logged]
    assert len(changes) == 4
    assert 0 < changes[0] < changes[-1]
    assert not torch.allclose(model.model.layers[0].mlp.act_fn.coefficients, before, atol=0.5)


@pytest.mark.slow
def test_calibration_leaves_the_random_state(tmp_path):
    def batches_of(calibrated):
        model, _ = rewritten()
        seen = []
        model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].clone()), with_kwargs=True)
        trainer_of(model, tmp_path, calibrate_batches=calibrated).train()
        return seen[calibrated:]

    assert all(torch.equal(one, other) for one, other in zip(batches_of(0), batches_of(3), strict=True))


@pytest.mark.slow
def test_the_callback_in_a_plain_trainer(tmp_path):
    callback = integration.ExpansionCallback(calibrate_batches=1, record=2)
    plain = transformers.Trainer
    model, _ = rewritten(form=a_channel)
    with pytest.raises(
        OrthoFxError, match=r"^the optimizer decays 8 parameters of expansions: use ExpansionTrainerMixin"
    ):
        trainer_of(model, tmp_path, plain, [callback]).train()
    trainer = trainer_of(model, tmp_path, plain, [callback], weight_decay=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["expansions/model.layers.0.mlp.act_fn/change"] > 0
    assert callback.calibration is not None
    course = callback.recorder.courses["model.layers.0.mlp.act_fn"]
    assert course.steps == list(range(0, trainer.state.global_step + 1, 2))
    assert not torch.equal(course.values[0]["coefficients"], course.values[-1]["coefficients"])
    late, _ = llama()
    optimizer = torch.optim.SGD(late.parameters(), lr=0.1)
    rewrite_(late, "hermite3")
    with pytest.raises(
        OrthoFxError, match=r"^the optimizer lacks 2 parameters of expansions: use ExpansionTrainerMixin"
    ):
        trainer_of(late, tmp_path, plain, [callback], optimizers=(optimizer, None)).train()


@pytest.mark.slow
def test_a_resumed_run_is_the_run(tmp_path):
    def run(steps, resume=False):
        model, _ = rewritten(form=a_channel)
        trainer = trainer_of(
            model, tmp_path, max_steps=6, save_strategy="steps", save_steps=3, expansion_lr=0.1, calibrate_batches=2
        )
        stop = Stop(steps)
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=resume)
        return model, [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]

    class Stop(transformers.TrainerCallback):
        def __init__(self, steps):
            self.steps = steps

        def on_step_end(self, args, state, control, **keywords):
            control.should_training_stop |= state.global_step == self.steps

    model, losses = run(6)
    for folder in tmp_path.glob("checkpoint-*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    run(3)
    again, resumed = run(6, resume=True)
    assert resumed == losses
    check_equal(again.eval(), model.eval(), TOKENS)
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6"), again, TOKENS)


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model, _ = rewritten()
    trainer = trainer_of(
        model, tmp_path, eval_rows=rows()[:8], eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(losses, key=losses.get)
    check_equal(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}"), model.eval(), TOKENS
    )
    assert trainer.evaluate()["eval_loss"] == losses[best]


@pytest.mark.slow
def test_the_backend_of_the_trainer(tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "ortho_fx", "max_steps": 1}
    model, _ = rewritten()
    trainer_of(model, tmp_path, **settings).train()
    plain, _ = llama()
    with pytest.raises(OrthoFxError, match=r"^the optimizer .* would miss the new parameters: call ortho_fx\.rewrite_"):
        trainer_of(plain, tmp_path, **settings).train()


def test_accelerate_knows_the_backend():
    utils = pytest.importorskip("accelerate.utils")
    assert utils.TorchDynamoPlugin(backend="ortho_fx").to_kwargs()["backend"] == "ortho_fx"
    assert "ORTHO_FX" in utils.DynamoBackend.list()


@pytest.mark.slow
def test_the_example(tmp_path, capsys):
    pytest.importorskip("accelerate")
    path = Path(__file__).parents[3] / "examples" / "transformers_trainer.py"
    runpy.run_path(str(path))["main"](["--steps", "5", "--out", str(tmp_path)])
    assert "logits after loading are equal: True" in capsys.readouterr().out
    assert config_of(tmp_path)["quantization_config"]["sites"]["transformer.h.0.mlp.act"]["basis"] == "hermite"
