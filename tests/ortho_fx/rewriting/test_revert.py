"""After `revert_`, and after a rewrite that fails half-way, the model is as it was."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, revert_, rewrite_
from ortho_fx.passes.source import calls


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act, self.fn = nn.Linear(4, 4), nn.GELU(), F.silu
        self.partial = functools.partial(F.gelu, approximate="tanh")
        object.__setattr__(self, "hidden", nn.ReLU())
        self.shared = nn.Sequential(self.act, nn.Linear(4, 4), self.act)

    def forward(self, x):
        x = self.shared(self.act(self.linear(x))) + self.fn(x) + self.partial(x) + self.hidden(x)
        return F.relu(x) + x * torch.sigmoid(1.5 * x)


def test_everything_is_put_back():
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(5, 4)
    expected, keys = model(x), list(model.state_dict())
    act, hidden, attributes = model.act, model.hidden, set(vars(model))
    report = rewrite_(model)
    assert {site.kind for site in report.replaced} == {"module", "attribute", "function", "formula"}
    assert not torch.equal(model(x), expected)
    names = revert_(model.eval()).names
    assert {"act", "shared.0", "shared.2", "fn", "partial", "hidden", "relu_expansion_0", "swish_expansion_0"} == set(
        names
    )
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert type(model) is Mixed
    assert model.act is act is model.shared[0] is model.shared[2]
    assert model.hidden is hidden
    assert "hidden" not in model._modules
    assert not act.training
    assert set(vars(model)) == attributes
    assert len(rewrite_(model).replaced) == len(report.replaced)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_put_back_as_well(copied):
    model, x = Mixed(), torch.randn(5, 4)
    expected = model(x)
    rewrite_(model)
    other = copied(model)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    revert_(other)
    assert torch.equal(other(x), expected)


def test_a_transformer_layer_takes_its_fused_path_again():
    for activation, flag in (("relu", 1), ("gelu", 2), (nn.GELU(), 2)):
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
        rewrite_(layer)
        assert layer.activation_relu_or_gelu == 0
        revert_(layer)
        assert layer.activation_relu_or_gelu == flag


def test_one_call_of_several_is_put_back_alone():
    model = Mixed()
    rewrite_(model, {"relu_expansion_0": ExpansionConfig()})
    rewrite_(model, {"swish_expansion_0": ExpansionConfig("fourier")})
    assert revert_(model).names == ("relu_expansion_0", "swish_expansion_0")
    assert type(model) is Mixed


def test_a_model_without_replacements_is_an_error():
    with pytest.raises(OrthoFxError, match=r"^Mixed holds no expansion that rewrite_ put there$"):
        revert_(Mixed())


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model, x = Mixed(), torch.randn(5, 4)
    expected, keys = model(x), list(model.state_dict())

    def broken(source):
        raise RuntimeError("no such class")

    # Modules and attributes are replaced before calls in the source, which fail here.
    monkeypatch.setattr(calls, "rewrite_class", broken)
    model.register_module("last", nn.GELU())
    with pytest.raises(RuntimeError, match="no such class"):
        rewrite_(model)
    assert type(model.last) is nn.GELU
    assert torch.equal(model(x), expected)
    assert [key for key in model.state_dict() if not key.startswith("last")] == keys


def test_a_list_of_registered_children_is_kept_in_step():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(4, 4), nn.ReLU()]
            for index, layer in enumerate(self.layers):
                self.add_module(str(index), layer)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Listed(), torch.randn(3, 4)
    expected = model(x)
    report = rewrite_(model)
    assert [site.name for site in report.sites] == ["1"]
    assert report.check(x).passed
    assert model.layers[1] is model._modules["1"]
    revert_(model)
    assert torch.equal(model(x), expected)


def test_a_calibrated_model_gets_its_own_modules_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    act = model[1]
    rewrite_(model, ExpansionConfig(init="calibrated"), example_inputs=torch.randn(32, 4))
    model.append(HermiteActivation())  # was never an activation of the model
    report = revert_(model)
    assert (report.names, report.kept) == (("1",), ("2",))
    assert str(report) == "1: reverted\n2: kept"
    assert model[1] is act


def test_what_learned_follows_the_model_to_another_dtype():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 4), nn.PReLU(dtype=torch.float64))
    act = model[1]
    rewrite_(model, targets=["prelu"])
    revert_(model)
    # The model stayed as it was, and so does an activation of another dtype.
    assert [model[1].weight.dtype, model[3].weight.dtype] == [torch.float32, torch.float64]
    rewrite_(model, targets=["prelu"])
    model.double()
    revert_(model)
    assert model[1] is act
    assert model(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
