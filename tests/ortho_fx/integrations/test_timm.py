"""timm's own functions on models with expansions. timm is no requirement, so these tests skip without it."""

import copy

import pytest
import torch
from torch import nn

from ortho_fx import (
    ExpansionActivation,
    ExpansionConfig,
    FourierActivation,
    HermiteActivation,
    OrthoFxError,
    TropicalRationalActivation,
    find_sites,
    param_groups,
    register_basis,
    rewrite_,
)
from ortho_fx.bases import HERMITE
from ortho_fx.bases.basis import Parameter
from ortho_fx.integrations.timm import enable
from tests.kinds import bases_from_outside

timm = pytest.importorskip("timm")
from timm.layers import create_act, create_act_layer, get_act_fn, get_act_layer  # noqa: E402
from timm.optim import create_optimizer_v2, param_groups_layer_decay  # noqa: E402

IMAGES = torch.zeros(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """Puts timm's tables back."""
    for name in ("_ACT_LAYER_DEFAULT", "_ACT_FN_DEFAULT"):
        monkeypatch.setattr(create_act, name, getattr(create_act, name))


def vit(**settings):
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, **settings)


def convnext(**settings):
    return timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), **settings)


def expansions(model):
    return [module for module in model.modules() if isinstance(module, ExpansionActivation)]


def test_names_become_expansions():
    enable()
    tables = create_act._ACT_LAYER_DEFAULT, create_act._ACT_FN_DEFAULT
    enable()
    assert (create_act._ACT_LAYER_DEFAULT, create_act._ACT_FN_DEFAULT) == tables
    assert create_act._ACT_LAYER_DEFAULT is tables[0]
    for name, cls, degree in (
        ("hermite", HermiteActivation, 3),
        ("Hermite7", HermiteActivation, 7),
        ("fourier5", FourierActivation, 5),
        ("tropical_rational6", TropicalRationalActivation, 6),
    ):
        made = create_act_layer(name, inplace=True)
        assert type(made) is cls
        assert made.config.degree == degree
        assert type(get_act_layer(name)(True)) is cls
        assert create_act_layer(name, dtype=torch.float64).config == made.config
    assert get_act_layer("relu") is nn.ReLU
    assert get_act_fn("relu") is nn.functional.relu


def test_a_basis_that_is_registered_later_has_names():
    enable()
    with bases_from_outside():
        parameters = (Parameter("coefficients", offset=1),)
        cls = register_basis(type(HERMITE)("forest2", "Forest2", parameters, range(1, 9), 3))
        assert type(create_act_layer("forest2", inplace=True)) is type(cls(inplace=True)) is cls
        assert create_act_layer("forest24").config.degree == 4
        model = vit(act_layer="forest24")
    assert {type(one) for one in expansions(model)} == {cls}


def test_names_that_are_not_ours_stay_errors():
    enable()
    with pytest.raises(KeyError, match="hermit3"):
        get_act_layer("hermit3")
    with pytest.raises(OrthoFxError, match=r"^degree of hermite must be an integer from 1 to 32; got 33$"):
        get_act_layer("hermite33")
    expected = (
        r"^hermite4 has parameters, .* call ortho_fx\.rewrite_\(model, ortho_fx\.ExpansionConfig\('hermite', 4\)\)$"
    )
    with pytest.raises(OrthoFxError, match=expected):
        get_act_fn("hermite4")


def test_entries_that_others_add_are_found(monkeypatch):
    old = create_act._ACT_LAYER_DEFAULT
    enable()
    monkeypatch.setitem(old, "early", nn.Tanh)
    monkeypatch.setitem(create_act._ACT_LAYER_DEFAULT, "late", nn.ELU)
    assert (get_act_layer("early"), get_act_layer("late")) == (nn.Tanh, nn.ELU)


def test_another_timm_is_refused(monkeypatch):
    monkeypatch.setattr(create_act, "_ACT_FN_DEFAULT", None)
    with pytest.raises(
        OrthoFxError, match=r"^this release of timm has no table timm\.layers\.create_act\._ACT_FN_DEFAUL"
    ):
        enable()


@pytest.mark.parametrize("act_layer", ["hermite3", HermiteActivation])
@pytest.mark.parametrize("make", [vit, convnext, lambda **settings: timm.create_model("resnet10t", **settings)])
def test_a_model_is_made_with_expansions(make, act_layer):
    enable()
    model = make(act_layer=act_layer)
    assert len(expansions(model)) == len([site for site in find_sites(make()) if not site.reason])
    model(IMAGES).sum().backward()
    assert all(one.coefficients.grad is not None for one in expansions(model))


@pytest.mark.parametrize("name", ["vgg11", "nest_tiny"])
def test_models_that_call_what_they_get_take_the_layer_of_a_name(name):
    enable()
    with torch.device("meta"):
        with pytest.raises(TypeError):
            timm.create_model(name, act_layer="hermite3")
        model = timm.create_model(name, act_layer=get_act_layer("hermite3"))
    assert len(expansions(model)) > 2


def test_models_that_take_no_activation_are_rewritten():
    with torch.device("meta"):
        with pytest.raises(TypeError, match="act_layer"):
            timm.create_model("swin_tiny_patch4_window7_224", act_layer=HermiteActivation)
        model = timm.create_model("swin_tiny_patch4_window7_224")
    assert len(rewrite_(model).replaced) == len(expansions(model)) == 12


def decayed(optimizer):
    return {id(one) for group in optimizer.param_groups if group["weight_decay"] for one in group["params"]}


@pytest.mark.parametrize("make", [vit, convnext])
@pytest.mark.parametrize("settings", [{}, {"layer_decay": 0.75}])
def test_optimizers_of_timm_decay_no_expansion(make, settings):
    plain, model = make(), make()
    rewrite_(model, ExpansionConfig(granularity="channel"), example_inputs=IMAGES)

    def names(model, wrapped=None):
        optimizer = create_optimizer_v2(wrapped or model, opt="adamw", lr=0.1, weight_decay=0.1, **settings)
        return {name for name, parameter in model.named_parameters() if id(parameter) in decayed(optimizer)}

    assert names(model) == names(plain) == names(copy.deepcopy(model))
    ours = {id(parameter) for one in expansions(model) for parameter in one.parameters()}
    compiled = torch.compile(model)
    optimizer = create_optimizer_v2(compiled, opt="adamw", lr=0.1, weight_decay=0.1, **settings)
    assert all(parameter.dim() == 2 for one in expansions(model) for parameter in one.parameters())
    assert not decayed(optimizer) & ours


@pytest.mark.parametrize("make", [vit, convnext, lambda: timm.create_model("resnet10t")])
def test_rates_by_layer_are_those_of_timm(make):
    model = make()
    theirs = {id(p): group["lr_scale"] for group in param_groups_layer_decay(model) for p in group["params"]}
    rewrite_(model)
    groups = param_groups(model, lr=1.0, layer_decay=0.75)
    ours = {id(p): group["lr"] for group in groups for p in group["params"] if "expansions" not in group["name"]}
    assert ours == pytest.approx(theirs)
    assert len(set(ours.values())) > 3


def test_expansions_have_the_rates_that_timm_gives_them():
    for model in (vit(), convnext()):
        rewrite_(model)
        theirs = {id(p): group["lr_scale"] for group in param_groups_layer_decay(model) for p in group["params"]}
        groups = param_groups(model, lr=1.0, layer_decay=0.75)
        assert {id(p): group["lr"] for group in groups for p in group["params"]} == pytest.approx(theirs)


def test_names_of_timm_are_honoured_when_the_model_is_wrapped():
    model = vit()
    rewrite_(model)
    groups = param_groups(nn.ModuleDict({"task": torch.compile(model)}), lr=0.1, weight_decay=0.1)
    matrices = next(group["params"] for group in groups if group["weight_decay"])
    assert not {id(model.pos_embed), id(model.cls_token)} & {id(one) for one in matrices}
