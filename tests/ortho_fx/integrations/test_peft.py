"""PEFT trains, saves, switches and merges expansions with its adapters, whatever is done first."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ortho_fx
from ortho_fx import ExpansionActivation, ExpansionConfig, OrthoFxError, rewrite_

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("ortho_fx.integrations.peft")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
TOKENS = torch.arange(16).reshape(2, 8)


@pytest.fixture(autouse=True)
def enabled():
    integration.enable()
    yield
    integration.disable()


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 16), nn.Linear(16, 8), act

    def forward(self, x):
        return self.down(self.act(F.gelu(self.up(x))))


class Shared(nn.Module):
    """Calls in source, and one module in two places."""

    def __init__(self):
        super().__init__()
        act = nn.SiLU()
        self.a, self.b = Block(act), Block(act)

    def forward(self, input_ids):
        x = F.one_hot(input_ids % 8, 8).float()
        return self.b(self.a(x))


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


MODELS = {"llama": (llama, "q_proj"), "gpt2": (gpt2, "c_attn"), "shared": (Shared, "up")}
CONFIGS = {"layer": ExpansionConfig("fourier", 3), "channel": ExpansionConfig("hermite", 3, granularity="channel")}


def made(kind):
    torch.manual_seed(0)
    return MODELS[kind][0]().eval()


def rewritten(model, config="layer"):
    rewrite_(model, CONFIGS[config], example_inputs={"input_ids": TOKENS})
    return model


def lora(kind, **named):
    return peft.LoraConfig(target_modules=[MODELS[kind][1]], r=2, init_lora_weights=False, **named)


def adapted(kind, order, config="layer", **named):
    """A model with an adapter and expansions, made in this order, and the model that is its base."""
    model, settings = made(kind), lora(kind, **named)
    if order == "rewrite first":
        base = copy.deepcopy(rewritten(model, config))
        return peft.get_peft_model(model, settings).eval(), base
    return rewritten(peft.get_peft_model(model, settings).eval(), config), made(kind)


def output(model, x=TOKENS):
    with torch.no_grad():
        y = model(input_ids=x)
    return y if isinstance(y, torch.Tensor) else y.logits


def trained(model):
    """Takes a step, by which every trained parameter changes."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    y = model(input_ids=TOKENS)
    (y if isinstance(y, torch.Tensor) else y.logits).square().mean().backward()
    optimizer.step()
    return model


def learning(model):
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, ExpansionActivation) and all(one.requires_grad for one in module.parameters())
    }


both = pytest.mark.parametrize("order", ["rewrite first", "adapter first"])
kinds = pytest.mark.parametrize("kind", MODELS)
granularities = pytest.mark.parametrize("config", CONFIGS)


@both
@kinds
@granularities
def test_expansions_are_trained_saved_and_loaded(kind, order, config, tmp_path):
    model, base = adapted(kind, order, config)
    assert len(learning(model)) == {"llama": 2, "gpt2": 2, "shared": 3}[kind]
    before = output(model)
    starts = {id(one): one.clone() for one in model.parameters() if one.requires_grad}
    trained(model)
    assert not any(torch.equal(one, starts[id(one)]) for one in model.parameters() if one.requires_grad)
    expected = output(model)
    assert not torch.equal(before, expected)
    with model.disable_adapter():
        torch.testing.assert_close(output(model), output(base), rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["ortho_fx"]["version"] == 1
    assert all(not name.startswith("base_model") for name in described["modules_to_save"])
    for again in (rewritten(made(kind), config), made(kind)):
        is_plain = not any(isinstance(module, ExpansionActivation) for module in again.modules())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|ortho_fx|Unexpected)")
            loaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
        assert torch.equal(output(loaded), expected)
        assert not learning(loaded)
        if is_plain:
            with loaded.disable_adapter():
                assert torch.equal(output(loaded), output(made(kind)))
        assert torch.equal(output(copy.deepcopy(loaded)), expected)
        again = peft.PeftModel.from_pretrained(made(kind), tmp_path, is_trainable=True)
        assert len(learning(again)) == len(learning(model))


@both
@kinds
def test_merging_keeps_the_function_and_unloading_gives_back_the_base(kind, order):
    model, base = adapted(kind, order)
    expected = output(trained(model))
    copied = copy.deepcopy(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged), expected, rtol=0, atol=1e-6)
    assert not any(type(module).__module__.startswith("peft") for module in merged.modules())
    assert len(ortho_fx.expansion_config(merged)["sites"]) == {"llama": 2, "gpt2": 2, "shared": 3}[kind]
    assert not rewrite_(merged, CONFIGS["layer"]).replaced
    state = merged.state_dict()
    ortho_fx.rewrite_like_(fresh := made(kind), state)
    fresh.load_state_dict(state)
    assert torch.equal(output(fresh), output(merged))
    unloaded = copied.unload()
    torch.testing.assert_close(output(unloaded), output(base), rtol=0, atol=1e-6)
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base.named_modules()]
    assert ortho_fx.revert_(merged).names
    assert output(merged).isfinite().all()


@both
def test_several_adapters_have_their_own_expansions(order, tmp_path):
    model, base = adapted("llama", order)
    expected = {"default": output(trained(model))}
    model.add_adapter("other", lora("llama"))
    torch.testing.assert_close(output(model), expected["default"], rtol=0, atol=0)
    model.set_adapter("other")
    assert len(learning(model)) == (2 if order == "rewrite first" else 0)
    expected["other"] = output(trained(model))
    model.set_adapter("default")
    assert torch.equal(output(model), expected["default"])
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, adapter_name="default").eval()
    loaded.load_adapter(tmp_path / "other", "other")
    for name, value in expected.items():
        loaded.set_adapter(name)
        assert torch.equal(output(loaded), value)
    plain = peft.get_peft_model(made("llama"), lora("llama"), adapter_name="third").eval()
    third = output(plain)
    for name in ("default", "other"):
        plain.load_adapter(tmp_path / ("" if name == "default" else name), name)
        plain.set_adapter(name)
        if order == "adapter first" or name == "default":
            assert torch.equal(output(plain), expected[name])
    plain.set_adapter("third")
    assert torch.equal(output(plain), third)
    plain.delete_adapter("default")
    assert torch.equal(output(plain), third)
    if order == "rewrite first":
        with pytest.raises(ValueError, match="Only one adapter"):
            loaded.base_model.set_adapter(["default", "other"])


def test_an_adapter_is_deleted_with_its_expansions():
    model, _ = adapted("shared", "rewrite first")
    trained(model)
    model.add_adapter("other", lora("shared"))
    model.delete_adapter("default")
    assert len(learning(model)) == 3
    assert not any("default" in name for name in model.state_dict())
    assert output(model).isfinite().all()


@both
def test_state_dicts_of_adapters_have_the_expansions(order):
    model, _ = adapted("llama", order)
    trained(model)
    state = peft.get_peft_model_state_dict(model)
    assert sum(".act_fn." in name for name in state) == 8
    other, _ = adapted("llama", order)
    peft.set_peft_model_state_dict(other, state)
    assert torch.equal(output(other), output(model))
    again, _ = adapted("llama", order)
    again.load_state_dict(model.state_dict())
    assert torch.equal(output(again), output(model))
    assert torch.equal(output(pickle.loads(pickle.dumps(model))), output(model))


METHODS = {
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], init_r=2, target_r=2, total_step=10),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "tokens": lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "all linear": lambda: peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"),
    "adaption": lambda: peft.AdaptionPromptConfig(adapter_layers=1, adapter_len=2, task_type="CAUSAL_LM"),
}


@both
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_train_and_save_them_too(method, order, tmp_path):
    model, settings = made("llama"), METHODS[method]()
    base = copy.deepcopy(rewritten(model) if order == "rewrite first" else model)
    model = peft.get_peft_model(model, settings).eval()
    if order == "adapter first":
        rewrite_(model, CONFIGS["layer"])
    assert len(learning(model)) == 2
    expected = output(trained(model))
    model.save_pretrained(tmp_path)
    for again in (base, made("llama")):
        loaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
        torch.testing.assert_close(output(loaded), expected, rtol=0, atol=1e-6)
    with model.disable_adapter():
        output(model)


def test_an_expansion_in_a_module_that_the_adapter_keeps_is_left_to_peft(tmp_path):
    settings = lora("llama", modules_to_save=["mlp"])
    model = peft.get_peft_model(rewritten(made("llama")), settings).eval()
    assert len(learning(model)) == 2
    expected = output(trained(model))
    model.save_pretrained(tmp_path)
    for again in (rewritten(made("llama")), made("llama")):
        loaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
        assert torch.equal(output(loaded), expected)
    with loaded.disable_adapter():
        assert torch.equal(output(loaded), output(made("llama")))


def test_the_base_model_has_other_expansions_than_the_adapter(tmp_path):
    model, _ = adapted("llama", "rewrite first")
    model.save_pretrained(tmp_path)
    base = made("llama")
    rewrite_(base, "hermite3")
    with pytest.raises(OrthoFxError, match=r"act_fn holds hermite 3 already, and the source has fourier 3"):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_an_adapter_without_expansions_leaves_them_frozen_with_a_warning(tmp_path):
    peft.get_peft_model(made("llama"), lora("llama")).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="stay frozen in the base model, since the file of the adapter default has"):
        loaded = peft.PeftModel.from_pretrained(rewritten(made("llama")), tmp_path, is_trainable=True)
    assert not learning(loaded)


def test_functions_of_ours_see_the_expansions_of_the_active_adapter():
    model = peft.get_peft_model(made("llama"), lora("llama")).eval()
    report = rewrite_(model, CONFIGS["layer"])
    assert not report.notes
    assert report.check({"input_ids": TOKENS}).passed
    assert not rewrite_(model, CONFIGS["layer"]).replaced
    measured = ortho_fx.calibrate_(model, [{"input_ids": TOKENS}])
    assert len(measured.sites) == 2
    groups = {group["name"]: group["params"] for group in ortho_fx.param_groups(model, lr=1e-3, weight_decay=0.1)}
    assert len(groups["expansions"]) == 8
    with pytest.raises(OrthoFxError, match=r"belong to its adapters: model.unload\(\) removes both"):
        ortho_fx.revert_(model)


def test_without_the_integration_a_note_says_what_to_call(tmp_path):
    integration.disable()
    model = peft.get_peft_model(made("llama"), lora("llama"))
    with pytest.warns(UserWarning, match=r"call ortho_fx.integrations.peft.enable\(\) before rewrite_"):
        report = rewrite_(model.get_base_model().model.layers[0], "fourier3")
    assert "files will not have the new expansions" in report.notes[0]
    integration.enable()
    with pytest.raises(OrthoFxError, match=r"would not have the trained expansions at .*layers\.0\.mlp\.act_fn"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "shared"])
def test_frozen_expansions_of_an_adapter_are_saved(kind, tmp_path):
    model, _ = adapted(kind, "adapter first")
    ortho_fx.freeze_(trained(model))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(made(kind), tmp_path).eval()
    assert torch.equal(output(loaded), output(model))
    with loaded.disable_adapter():
        assert torch.equal(output(loaded), output(made(kind)))
    assert not any(
        isinstance(module, ortho_fx.activations.freeze.FrozenExpansion) for module in loaded.unload().modules()
    )


def test_a_base_that_learns_where_the_adapter_is_frozen_is_refused(tmp_path):
    model, _ = adapted("llama", "adapter first")
    ortho_fx.freeze_(trained(model))
    model.save_pretrained(tmp_path)
    with pytest.raises(OrthoFxError, match="act_fn holds fourier 3 already, and the source has frozen fourier 3"):
        peft.PeftModel.from_pretrained(rewritten(made("llama")), tmp_path)


def test_a_config_may_serve_two_models():
    settings = lora("llama")
    first = peft.get_peft_model(rewritten(made("llama")), settings)
    second = peft.get_peft_model(made("llama"), settings)
    assert (len(learning(first)), len(learning(second))) == (2, 0)
    assert torch.equal(output(second.unload()), output(made("llama")))


def test_parts_may_be_rewritten_before_and_after(tmp_path):
    base = made("llama")
    rewrite_(base, {"*layers.0*": "fourier3"})
    model = peft.get_peft_model(copy.deepcopy(base), lora("llama")).eval()
    rewrite_(model.get_base_model(), {"*layers.1*": "hermite3"})
    expected = output(trained(model))
    with model.disable_adapter():
        assert torch.equal(output(model), output(base))
    model.save_pretrained(tmp_path)
    for again in (base, made("llama")):
        assert torch.equal(output(peft.PeftModel.from_pretrained(again, tmp_path).eval()), expected)


@both
def test_a_trainer_saves_and_goes_on(order, tmp_path):
    pytest.importorskip("accelerate")
    data = [{"input_ids": torch.arange(8) * (i + 1) % 64, "labels": torch.arange(8)} for i in range(16)]

    def trainer(folder):
        model, _ = adapted("llama", order)
        settings = transformers.TrainingArguments(
            tmp_path / folder,
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return transformers.Trainer(model, settings, train_dataset=data)

    whole = trainer("whole")
    whole.train()
    expected = output(whole.model.eval())
    loaded = peft.PeftModel.from_pretrained(made("llama"), tmp_path / "whole" / "checkpoint-4").eval()
    assert torch.equal(output(loaded), expected)
    rest = trainer("rest")
    rest.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert torch.equal(output(rest.model.eval()), expected)
