"""PyTorch's Transformer modules: nested tensors of padded inputs, and copies that must not hide an expansion."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ortho_fx import ExpansionActivation, ExpansionConfig, find_sites, freeze_, revert_, rewrite_

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
FIT = ExpansionConfig("tropical_rational", 32, "fit")


def encoder(activation="gelu"):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def padded():
    torch.manual_seed(1)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 4:] = True
    return {"src": torch.randn(3, 5, 16), "src_key_padding_mask": mask}


def copies(model):
    yield model
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("activation", ["relu", "gelu", F.gelu, nn.GELU()], ids=["relu", "gelu", "function", "module"])
def test_padded_inputs_of_encoders(activation):
    model, batch = encoder(activation), padded()
    kept = ~batch["src_key_padding_mask"]
    nests = model.use_nested_tensor
    with torch.no_grad():
        expected = model(**batch)
        rewrite_(model, FIT)
        for twin in copies(model):
            assert_close(twin(**batch)[:, : expected.shape[1]][kept], expected[kept], rtol=1e-2, atol=1e-2)
            freeze_(twin) if twin is not model else None
            assert_close(twin(**batch)[kept], model(**batch)[kept])
        revert_(model)
        assert model.use_nested_tensor == nests
        assert torch.equal(model(**batch), expected)


def test_padded_example_inputs():
    for config in (ExpansionConfig("hermite", 3, "calibrated"), ExpansionConfig("hermite", 3, granularity="channel")):
        model = encoder()
        rewrite_(model, config, example_inputs=padded())
        with torch.no_grad():
            assert model(**padded()).isfinite().all()


def test_encoders_that_hold_no_expansion_stay_as_they_were():
    model = nn.ModuleList([encoder(), encoder()])
    rewrite_(model, {"0.*": FIT})
    assert [each.use_nested_tensor for each in model] == [False, True]
    assert [each.enable_nested_tensor for each in model] == [True, True]


class Rebuilding(nn.Module):
    """As old checkpoints have it: what an earlier version did not save is put in."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def __setstate__(self, state):
        super().__setstate__(state)
        self.act = nn.ReLU() if "act" in self._modules else F.relu

    def forward(self, x):
        return self.act(x)


class Hiding(Rebuilding):
    def __setstate__(self, state):
        if "act" not in state:
            state["act"] = F.relu
        super(Rebuilding, self).__setstate__(state)


class Mixed(Hiding):
    """A call in its code as well, which gives it a class of its own already."""

    def forward(self, x):
        return F.silu(self.act(x))


@pytest.mark.parametrize("cls", [Rebuilding, Hiding, Mixed])
def test_copies_keep_expansions_that_a_setstate_would_hide(cls):
    x = torch.randn(5)
    for act in (nn.GELU(), F.gelu) if cls is not Rebuilding else (nn.GELU(),):
        model = nn.Sequential(cls(act))
        rewrite_(model)
        expected = model(x)
        for twin in copies(model):
            assert torch.equal(twin(x), expected)
            for again in copies(twin):
                assert torch.equal(again(x), expected)
                assert "act" not in vars(again[0])
                assert not [site for site in find_sites(again) if not site.reason]
        revert_(model)
        assert type(model[0]) is cls
        assert model[0].act is act


@pytest.mark.parametrize("activation", [F.relu, F.gelu, nn.GELU()], ids=["relu", "gelu", "module"])
def test_copies_of_decoder_layers(activation):
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, activation=activation, batch_first=True).eval()
    inputs = torch.randn(2, 3, 16), torch.randn(2, 4, 16)
    original = model(*inputs)
    rewrite_(model)
    expected = model(*inputs)
    for twin in copies(model):
        assert torch.equal(twin(*inputs), expected)
        assert isinstance(twin.activation, ExpansionActivation)
        assert isinstance(twin, nn.TransformerDecoderLayer)
        assert str(rewrite_(twin)).endswith("already held 1 expansions")
    revert_(model)
    assert type(model) is nn.TransformerDecoderLayer
    assert torch.equal(model(*inputs), original)


def test_copies_of_whole_transformers():
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True).eval()
    inputs = torch.randn(2, 3, 16), torch.randn(2, 4, 16)
    rewrite_(model, ExpansionConfig("hermite", 3))
    for twin in copies(model):
        assert torch.equal(twin(*inputs), model(*inputs))
