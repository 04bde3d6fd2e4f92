"""Activations of a comparison are read from their texts."""

from pathlib import Path

import pytest

from ortho_fx import ExpansionConfig, OrthoFxError
from ortho_fx.config import INITS
from ortho_fx.models.compare.activations import Activation, choose_activations
from ortho_fx.models.recipe import TrainConfig

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("text", "label", "slug"),
    [
        ("gelu", "gelu", "gelu"),
        (" GELU , lr = 8e-3 ", "gelu,lr=0.008", "gelu-lr-0.008"),
        ("hermite", "hermite:3", "hermite-3"),
        ("hermite:08", "hermite:8", "hermite-8"),
        ("fourier:5:tied", "fourier:5:tied", "fourier-5-tied"),
        ("fourier:tied", "fourier:5:tied", "fourier-5-tied"),
        (
            "tropical_rational:6,init=fit,expansion_lr=0.02",
            "tropical_rational:6,expansion_lr=0.02,init=fit",
            "tropical_rational-6-expansion_lr-0.02-init-fit",
        ),
        ("tropical,granularity=group:4,calibrate=false", "tropical:5,calibrate=false,granularity=group:4", None),
        ("hermite,clamp=none,warmup=5", "hermite:3,clamp=none,warmup=5", None),
        ("fourier:5:frozen", "fourier:5:frozen", "fourier-5-frozen"),
        ("fourier:gated:tied", "fourier:5:tied:gated", "fourier-5-tied-gated"),
        ("relu_squared", "relu_squared", "relu_squared"),
        ("polynorm", "polynorm:3", "polynorm-3"),
        ("gelu:calibrated,lr=1", "gelu:calibrated,lr=1.0", "gelu-calibrated-lr-1.0"),
        ("silu:gated", "swiglu", "swiglu"),
        ("geglu", "geglu", "geglu"),
        ("silu:calibrated:gated", "silu:calibrated:gated", "silu-calibrated-gated"),
        ("torchortho:hermite", "torchortho:hermite:3", "torchortho-hermite-3"),
        ("own", "own", "own"),
    ],
)
def test_an_activation_has_one_label_and_a_directory(text, label, slug):
    activation = Activation.parse(text)
    assert activation.label == label
    assert Activation.parse(label) == activation
    assert set(activation.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    if slug is not None:
        assert activation.slug == slug


def test_a_run_has_what_is_common_and_what_is_its_own():
    common = TrainConfig(basis="fourier", tied=True, clamp=4.0, steps=7, lr=1e-3, seed=3, expansion_lr=0.1)
    run = Activation.parse("hermite:8,lr=0.02,clamp=none").configure(common, 5, Path("out"))
    assert run.expansion == ExpansionConfig("hermite", 8)
    assert (run.lr, run.steps, run.seed, run.directory) == (
        0.02,
        7,
        5,
        Path("out/hermite-8-clamp-none-lr-0.02-seed5"),
    )
    untouched = Activation.parse("gelu").configure(common, 0, Path("out"))
    assert untouched.expansion is None
    assert untouched.lr == 1e-3
    assert untouched.expansion_lr is None


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("relu_squared", {"basis": "none", "stock": "relu_squared", "gated": False}),
        ("swiglu", {"basis": "none", "stock": None, "gated": True}),
        ("geglu", {"basis": "none", "stock": "gelu", "gated": True}),
        ("silu", {"basis": "none", "stock": "silu", "gated": False}),
        ("gelu:calibrated", {"basis": "none", "stock": "gelu:calibrated"}),
        ("hermite:4:gated", {"basis": "hermite", "degree": 4, "gated": True, "stock": None}),
        ("fourier:5:frozen", {"basis": "fourier", "freeze": True}),
        ("hermite,expansion_decay=0.1,expansion_lr=0.2", {"expansion_decay": 0.1, "expansion_lr": 0.2}),
    ],
)
def test_what_an_activation_makes_of_a_run(text, fields):
    run = Activation.parse(text).configure(TrainConfig(basis="none"), 0, Path("out"))
    assert {name: getattr(run, name) for name in fields} == fields


def test_a_model_keeps_the_activation_that_it_is_published_with():
    gelu, tanh = Activation.parse("gelu"), Activation.parse("gelu_tanh")
    gpt2, convnext = TrainConfig(basis="none"), TrainConfig(model="convnext", basis="none")
    assert [one.configure(gpt2, 0, Path("out")).stock for one in (gelu, tanh)] == ["gelu", None]
    assert [one.configure(convnext, 0, Path("out")).stock for one in (gelu, tanh)] == [None, "gelu_tanh"]
    other = TrainConfig(model="mine.py:problem", basis="none")
    assert gelu.configure(other, 0, Path("out")).stock == "gelu"
    assert Activation.parse("own").configure(other, 0, Path("out")).stock is None
    with pytest.raises(OrthoFxError, match=r"^swiglu needs a model with gates; make them in mine\.py:problem, without"):
        Activation.parse("swiglu").configure(other, 0, Path("out"))


def test_the_reference_comes_first_and_is_added_where_it_is_missing():
    def labels(texts, reference):
        return [activation.label for activation in choose_activations(texts, reference, TrainConfig())]

    assert labels(["hermite", "fourier"], "gelu") == ["gelu", "hermite:3", "fourier:5"]
    assert labels(["hermite", "gelu", "fourier"], "gelu") == ["gelu", "hermite:3", "fourier:5"]
    assert labels(["hermite", "gelu"], "hermite:3") == ["hermite:3", "gelu"]
    # 0.004 is the default learning rate, so both texts describe the same run.
    assert labels(["hermite", "gelu,lr=0.004"], "gelu") == ["gelu,lr=0.004", "hermite:3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an activation is one of own, gelu, gelu_tanh, relu, "),
        ("bessel:3", "as in hermite:8,lr=0.01; got 'bessel:3'"),
        ("hermite:x", "after hermite come its degree and then tied, gated, frozen, each with a colon before it; got"),
        ("fourier:tied:5", "after fourier come its degree and then tied, gated, frozen, each with a colon before it"),
        ("hermite:gated:gated", "after hermite come its degree and then tied, gated, frozen, each with a colon before"),
        ("hermite:99", "degree of hermite must be an integer from 1 to 32; got 99"),
        ("hermite:3:tied", "tied is for the frequencies of fourier; hermite has none"),
        ("hermite,init", "settings of an activation are NAME=VALUE, each once; got 'init' in 'hermite,init'"),
        ("hermite,lr=1,lr=2", "settings of an activation are NAME=VALUE, each once; got 'lr=2' in 'hermite,lr=1,lr=2'"),
        ("hermite,lr=fast", "lr must be a number; got 'fast' in 'hermite,lr=fast'"),
        ("hermite,warmup=1.5", "warmup must be a whole number; got '1.5' in 'hermite,warmup=1.5'"),
        ("hermite,calibrate=no", "calibrate must be true or false; got 'no' in 'hermite,calibrate=no'"),
        ("hermite,lr=-1", "lr must be 0 or more; got -1.0"),
        ("hermite,init=best", f"init must be one of {', '.join(INITS)}, depth:L or preset:FILE; got 'best'"),
        (
            "hermite,speed=1",
            "'speed' in 'hermite,speed=1' is no setting; an activation may set init, granularity, clamp",
        ),
        ("gelu:3", "gelu has no degree; got 3"),
        ("polynorm:gated", "polynorm needs all of a row, so it is no gate; got 'polynorm:gated'"),
        ("polynorm:calibrated", "polynorm normalises its own inputs, so it is not calibrated"),
        ("swiglu:3", "silu has no degree; got 3"),
        (
            "hermite:frozen,expansion_lr=1",
            "frozen expansions have no expansion_lr; got 'hermite:frozen,expansion_lr=1'",
        ),
        ("gelu,init=fit", "gelu has no expansion that 'init' could be of; got 'gelu,init=fit'"),
    ],
)
def test_wrong_texts_say_what_is_wrong(text, message):
    with pytest.raises(OrthoFxError) as caught:
        choose_activations([text], "gelu", TrainConfig())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name",
    "model size start_from dropout data image_size augment mixup steps batch_size accumulate seed dtype device compile "
    "eval_every out".split(),
)
def test_what_all_have_in_common_is_no_setting_of_one(name):
    with pytest.raises(OrthoFxError, match=rf"'{name}' in 'hermite,{name}=1' is the same for all activations"):
        Activation.parse(f"hermite,{name}=1")


@pytest.mark.parametrize("second", ["hermite:3", "hermite,lr=0.004", "hermite,clamp=none"])
def test_an_activation_that_is_there_twice_is_an_error(second):
    with pytest.raises(OrthoFxError, match=f"activations 'hermite' and '{second}' are the same"):
        choose_activations(["hermite", "gelu", second], "gelu", TrainConfig())
