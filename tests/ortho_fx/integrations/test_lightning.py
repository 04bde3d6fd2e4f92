"""The callback calibrates, checks optimizers, logs and describes; a run that goes on has the losses of a whole one."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ortho_fx
from ortho_fx import ExpansionActivation, OrthoFxError, param_groups, rewrite_

lightning = pytest.importorskip("lightning.pytorch")
integration = pytest.importorskip("ortho_fx.integrations.lightning")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Plain(lightning.LightningModule):
    """One activation is a module, one is called in source, one in the step."""

    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 1))
        self.losses = []

    def forward(self, x):
        return F.silu(self.layers(x))

    def training_step(self, batch, _):
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(param_groups(self, lr=1e-2, weight_decay=0.1))


class InInit(Plain):
    def __init__(self, width=16):
        super().__init__(width)
        rewrite_(self, "fourier3")


class InConfigureModel(Plain):
    def configure_model(self):
        rewrite_(self, "fourier3")


class Decaying(InInit):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Missing(InInit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.layers[0].parameters(), lr=1e-2)


class Late(Plain):
    """Rewrites itself after the optimizer is made."""

    def on_fit_start(self):
        rewrite_(self, "fourier3")


def data(shuffle=True):
    torch.manual_seed(1)
    x = torch.randn(64, 4) + 3
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8, shuffle=shuffle)


def fit(module, callback, folder, epochs=1, ckpt_path=None, shuffle=True):
    lightning.seed_everything(3, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[callback, lightning.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(shuffle), ckpt_path=ckpt_path)
    return trainer


def made(cls):
    torch.manual_seed(0)
    return cls()


@pytest.mark.parametrize("cls", [InInit, InConfigureModel])
def test_a_checkpoint_makes_the_same_module_again(cls, tmp_path):
    module, callback = made(cls), integration.Expansions(calibrate=4)
    trainer = fit(module, callback, tmp_path)
    assert {site.samples for site in callback.calibration.sites} == {4 * 8 * 16, 4 * 8}
    assert callback.calibration.sites[0].name == "layers.1"
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged.keys() == {"expansions/layers.1", "expansions/silu_expansion_0"}
    assert all(value > 0 for value in logged.values())
    (file,) = tmp_path.glob("*.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["ortho_fx"] == ortho_fx.expansion_config(module)
    again = cls.load_from_checkpoint(file)
    assert torch.equal(again(x := torch.randn(3, 4)), module(x))
    fresh = made(Plain)
    with pytest.raises(OrthoFxError, match="rewrite_like_"):
        Plain.load_from_checkpoint(file)
    ortho_fx.rewrite_like_(fresh, checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(fresh(x), module(x))
    with pytest.raises(OrthoFxError, match="rewrite_like_"):
        fit(made(Plain), integration.Expansions(), tmp_path, ckpt_path=file)


@pytest.mark.parametrize("cls", [InInit, InConfigureModel])
def test_a_run_that_goes_on_has_the_losses_of_one_that_was_not_stopped(cls, tmp_path):
    whole, callback = made(cls), integration.Expansions(calibrate=2)
    fit(whole, callback, tmp_path / "whole", epochs=3, shuffle=False)
    (file,) = (tmp_path / "whole").glob("epoch=1*.ckpt")
    rest, later = made(cls), integration.Expansions(calibrate=2)
    fit(rest, later, tmp_path / "rest", epochs=3, ckpt_path=file, shuffle=False)
    assert rest.losses == whole.losses[16:]
    assert later.calibration is None
    assert later.changes(rest) == callback.changes(whole)


def test_the_recorder_goes_on_with_the_run(tmp_path):
    whole, stopped, resumed = (integration.Expansions(record=5) for _ in range(3))
    fit(made(InInit), whole, tmp_path / "whole", 2, shuffle=False)
    fit(made(InInit), stopped, tmp_path / "stopped", 1, shuffle=False)
    (file,) = (tmp_path / "stopped").glob("*.ckpt")
    fit(made(InInit), resumed, tmp_path / "resumed", 2, ckpt_path=file, shuffle=False)
    for name in ("layers.1", "silu_expansion_0"):
        one, other = (callback.recorder.courses[name] for callback in (whole, resumed))
        assert one.steps == other.steps == [0, 5, 10, 15]
        for values, again in zip(one.values, other.values, strict=True):
            torch.testing.assert_close(values, again)
    assert not torch.equal(one.values[0]["coefficients"], one.values[3]["coefficients"])


def test_the_training_does_not_depend_on_the_calibration_s_batches(tmp_path):
    orders = []
    for batches in (0, 2):
        seen = []
        module = made(InInit)
        module.on_train_batch_start = lambda batch, _, seen=seen: seen.append(batch[0].clone())
        fit(module, integration.Expansions(calibrate=batches), tmp_path / str(batches))
        orders.append(torch.stack(seen))
    assert torch.equal(*orders)


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Missing, "the optimizer misses the expansions at layers.1, silu_expansion_0, which would not learn"),
        (Late, "the optimizer misses the expansions at layers.1, silu_expansion_0, which would not learn"),
        (Plain, "Plain holds no expansion: call rewrite_ in its __init__ or in configure_model"),
    ],
)
def test_what_would_not_learn_is_refused(cls, text, tmp_path):
    with pytest.raises(OrthoFxError, match=text):
        fit(made(cls), integration.Expansions(), tmp_path)


def test_decayed_expansions_are_a_warning(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(made(Decaying), integration.Expansions(), tmp_path)
    (told,) = [str(one.message) for one in caught if "ortho_fx" in str(one.message)]
    assert told.startswith("ortho_fx: the optimizer decays the expansions at layers.1, silu_expansion_0")


def test_frozen_expansions_need_no_optimizer(tmp_path):
    module = made(Missing)
    for one in module.modules():
        if isinstance(one, ExpansionActivation):
            one.requires_grad_(False)
    fit(module, integration.Expansions(), tmp_path)


def test_a_clamp_is_calibrated_too(tmp_path):
    class Clamped(Plain):
        def __init__(self):
            super().__init__()
            rewrite_(self, ortho_fx.ExpansionConfig("hermite", 3, clamp=3.0))

    module = Clamped()
    fit(module, integration.Expansions(calibrate=2), tmp_path)
    assert module.layers[1].bounds.tolist() != [-3.0, 3.0]


def test_it_works_under_the_library_s_other_name(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
            rewrite_(self, "fourier3")

        def forward(self, x):
            return self.layers(x)

        def training_step(self, batch, _):
            return F.mse_loss(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(param_groups(self, lr=1e-2, weight_decay=0.1))

    callback = integration.Expansions(calibrate=2)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = other.Trainer(max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, **settings)
    module = Module()
    trainer.fit(module, data())
    assert callback.changes(module)["layers.1"] > 0
