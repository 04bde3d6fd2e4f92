import math

import pytest

from ortho_fx import OrthoFxError
from ortho_fx.bases import BASES
from ortho_fx.models.recipe import TASKS, TrainConfig, load_recipe, recipes


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_of_the_package_is_a_run(name):
    values = load_recipe(name)
    assert values["model"] in TASKS
    config = TrainConfig.from_values({**values, "device": "cpu"})
    assert config.directory.name == name
    assert config.batch_size % config.accumulate == 0


def test_the_papers_runs_have_their_published_size():
    openwebtext, imagenet = load_recipe("gpt2-124m-openwebtext"), load_recipe("convnext-t-imagenet")
    assert openwebtext["batch_size"] * 1024 == 491_520
    assert imagenet["steps"] == math.ceil(300 * 1_281_167 / imagenet["batch_size"])
    assert imagenet["min_lr"] * imagenet["lr"] == pytest.approx(1e-6)


def test_a_recipe_is_a_file_as_well(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('model = "gpt2"\nsteps = 5\nlr = 1\n')
    config = TrainConfig.from_values(load_recipe(str(path)))
    assert (config.steps, config.lr, config.batch_size) == (5, 1.0, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "recipe {path} is not TOML: Invalid value (at end of document)"),
        ("speed = 9", "unknown setting 'speed'; settings are model, size, "),
        ("[schedule]\nlr = 1.0", "unknown setting 'schedule'; settings are model, size, "),
        ('steps = "5"', "steps must be a whole number; got '5'"),
        ("compile = 1", "compile must be true or false; got 1"),
        ("lr = nan", "lr must be finite; got nan"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(OrthoFxError) as caught:
        TrainConfig.from_values(load_recipe(str(path)))
    assert str(caught.value).startswith(message.format(path=path))


def test_a_recipe_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(OrthoFxError, match=r"^cannot read recipe gpt3: No such file .*: convnext-fine-tune, .*gpt2-sm"):
        load_recipe("gpt3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model must be one of gpt2, convnext; got 'bert'"),
        ({"size": "huge"}, "size must be one of tiny, small, 11m, 124m, 350m, 774m, 1.5b; got 'huge'"),
        ({"basis": "bessel"}, f"basis must be one of {', '.join(BASES)}; got 'bessel'"),
        ({"basis": "none", "degree": 3}, "degree goes with a basis, and basis is 'none'; got 3"),
        ({"basis": "none", "freeze": True}, "freeze goes with a basis, and basis is 'none'"),
        (
            {"freeze": True, "expansion_lr": 0.01},
            "frozen expansions do not learn: leave out expansion_lr, which is 0.01",
        ),
        (
            {"freeze": True, "expansion_min_lr": 0.5},
            "frozen expansions do not learn: leave out expansion_min_lr, which is 0.5",
        ),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adam, muon; got 'sgd'"),
        (
            {"optimizer": "muon", "parallel": "fsdp"},
            "muon needs whole matrices, and fsdp shards them: use ddp, or adamw",
        ),
        ({"steps": 0}, "steps must be 1 or more; got 0"),
        ({"accumulate": 0}, "accumulate must be 1 or more; got 0"),
        ({"clip": 0.0}, "clip must be above zero; got 0.0"),
        ({"clip": float("nan")}, "clip must be above zero; got nan"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"lr": -1.0}, "lr must be 0 or more; got -1.0"),
        ({"ema": 1.0}, "ema must be from 0 to below 1; got 1.0"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16; got 'int8'"),
        ({"parallel": "zero"}, "parallel must be one of ddp, fsdp; got 'zero'"),
        ({"device": "nowhere"}, "device 'nowhere' is not available on this machine"),
        ({"mixup": 0.8}, "mixup is a setting of convnext; the model is gpt2"),
        ({"model": "convnext", "dropout": 0.1}, "dropout is a setting of gpt2; the model is convnext"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(OrthoFxError) as caught:
        TrainConfig(**changes)
    assert str(caught.value) == message


def test_a_degree_without_a_basis_is_that_of_a_polynomial():
    config, default = TrainConfig(degree=4), TrainConfig()
    assert (config.basis, config.degree, default.basis, default.degree) == ("hermite", 4, "fourier", 5)
    assert TrainConfig(basis="fourier", degree=4).activation == "fourier 4"


def test_fine_tuning_starts_as_the_activation_that_is_replaced():
    assert TrainConfig().init == "stable"
    assert TrainConfig(start_from="gpt2").init == "fit"
    assert TrainConfig(start_from="gpt2", init="paper").init == "paper"


def test_where_a_run_is_and_how_it_is_computed_is_not_what_it_is_of():
    config = TrainConfig(out="a", device="cpu", accumulate=2, parallel="fsdp", eval_every=7)
    assert config.configuration() == TrainConfig(out="b", compile=False).configuration()
    assert config.configuration() != TrainConfig(seed=1).configuration()
    # Checkpoints of earlier releases do not have these.
    assert not {"gated", "freeze"} & TrainConfig().configuration().keys()
    assert TrainConfig(freeze=True).configuration()["freeze"] is True


def test_every_setting_says_what_it_is_for():
    for setting in TrainConfig.settings():
        assert setting.metadata["type"] in (str, int, float, bool)
        assert len(setting.metadata["help"]) > 10
