import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import fx, nn

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, freeze_, revert_, rewrite_, rewrite_like_

PER_CHANNEL = ExpansionConfig("hermite", granularity="channel")


class Network(nn.Module):
    """A network that names its table; its activation is called in its own code or is a child."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 4))
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def no_weight_decay(self):
        return ["table"]

    def forward(self, x):
        return torch.relu(self.inner(x + self.table))


def rewritten(model):
    rewrite_(model, PER_CHANNEL, example_inputs=torch.randn(2, 4))
    return model


def names(model):
    return {name for name in model.no_weight_decay() if not name.startswith("_orig_mod.")}


OURS = {"inner.1.coefficients", "relu_expansion_0.coefficients"}


def test_a_model_names_its_expansions_besides_its_own_names():
    model = rewritten(Network())
    assert names(model) == {"table", *OURS}
    assert {name for name, _ in model.named_parameters() if name in OURS} == OURS
    # Also a part of it that is given to an optimizer alone, and what holds it.
    assert names(model.inner) == {"1.coefficients"}
    assert names(rewritten(nn.Sequential(Network()))) == {f"0.{name}" for name in OURS}


def test_a_compiled_model_names_them_as_it_calls_them():
    compiled = torch.compile(rewritten(Network()))
    learned = {name for name, _ in compiled.named_parameters() if name.endswith("coefficients")}
    assert learned == {f"_orig_mod.{name}" for name in OURS} <= compiled.no_weight_decay()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_name_their_own(again):
    model = rewritten(Network())
    copied = again(model)
    assert names(copied) == {"table", *OURS}
    freeze_(model)
    assert names(model) == {"table"}
    assert names(copied) == {"table", *OURS}


def test_revert_leaves_nothing_behind():
    model = Network()
    kept = [set(vars(module)) for module in model.modules()]
    revert_(rewritten(model))
    assert [set(vars(module)) for module in model.modules()] == kept
    assert model.no_weight_decay() == ["table"]


def test_a_method_of_the_instance_comes_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    model.no_weight_decay = own = lambda: {"0.weight"}
    assert names(rewritten(model)) == {"0.weight", "1.coefficients"}
    revert_(model)
    assert vars(model)["no_weight_decay"] is own


def test_something_else_of_the_name_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    model.no_weight_decay = ["0.weight"]
    assert rewritten(model).no_weight_decay == ["0.weight"]


def test_a_model_that_rewrite_like_makes_has_the_names():
    model = Network()
    rewrite_like_(model, rewritten(Network()))
    assert names(model) == {"table", *OURS}


def test_a_failed_rewrite_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    with pytest.raises(OrthoFxError):
        rewrite_(model, ExpansionConfig(init="calibrated"), example_inputs=torch.full((2, 4), torch.nan))
    assert not hasattr(model, "no_weight_decay")


def test_a_setattr_that_refuses_is_not_asked():
    class Closed(nn.Sequential):
        def __setattr__(self, name, value):
            assert name == "training", f"{name} is not to be set"
            super().__setattr__(name, value)

    assert names(rewritten(Closed(nn.Linear(4, 4), nn.GELU()))) == {"1.coefficients"}


def test_an_expansion_that_replaced_nothing_adds_no_method():
    model = nn.Sequential(nn.Linear(4, 4), HermiteActivation(3))
    rewrite_(model, "hermite")
    assert not hasattr(model, "no_weight_decay")


def test_the_method_keeps_no_model_alive():
    model = rewritten(nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    gone, shallow = weakref.ref(model), copy.copy(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(OrthoFxError, match=r"^no_weight_decay\(\) of a shallow copy, whose original is gone: copy"):
        shallow.no_weight_decay()
    with pytest.raises(OrthoFxError, match="shallow copy"):
        pickle.loads(pickle.dumps(copy.deepcopy(shallow))).no_weight_decay()


def test_a_graph_module_gets_no_method_since_its_copies_would_lose_it():
    model = rewritten(fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.GELU())))
    assert not hasattr(model, "no_weight_decay")
    x = torch.randn(2, 4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
