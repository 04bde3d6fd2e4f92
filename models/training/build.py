"""The model and the data of a run, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ortho_fx.activations.freeze import freeze_
from ortho_fx.errors import OrthoFxError
from ortho_fx.memory import require_memory
from ortho_fx.models import convnext, gpt2
from ortho_fx.models.custom import Custom, CustomBatches, Loss, is_custom
from ortho_fx.models.data.images import Images
from ortho_fx.models.data.sources import DataConfig, open_data
from ortho_fx.models.data.text import Tokens
from ortho_fx.models.gpt2 import GPT2
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.stock import Stock, calibrate_stock_, exchange_
from ortho_fx.models.weights.layouts import load_pretrained
from ortho_fx.passes.vocabulary.expansions import Expansion, LearnableExpansion
from ortho_fx.rewriting.calibration import calibrate_
from ortho_fx.rewriting.rewrite import rewrite_


@dataclass(frozen=True)
class Built:
    """A model and its data; `notes` say how a pretrained model differs from its file.

    `loss` is that of a user's file, and None for cross entropy.
    """

    model: nn.Module
    data: Tokens | Images | CustomBatches
    notes: tuple[str, ...] = ()
    loss: Loss | None = None


def build(config: TrainConfig, device: torch.device | None = None) -> Built:
    """Opens the data, makes or loads the model, and replaces its activations by expansions.

    A new model depends on the run's seed. The data overrides the preset's numbers of channels, classes and, if it is
    known, tokens.

    Args:
        config: the run.
        device: where the model goes (None: the CPU).

    Raises:
        OrthoFxError: data or weights that cannot be read, or that do not fit each other or the run.
    """
    assert config.batch_size is not None
    torch.manual_seed(config.seed)
    if is_custom(config.model):
        built = _custom_model(config)
    else:
        built = (_language_model if config.model == "gpt2" else _image_model)(config)
    # Before anything of that size is made; the activations take many times more.
    part = -(-config.batch_size // config.accumulate)
    if isinstance(built.data, Tokens):
        require_memory(part * built.data.context * 16, f"batch_size is {config.batch_size}")
    elif isinstance(built.data, Images):
        sample = 4 * built.data.channels * built.data.image_size**2
        require_memory(part * sample, f"batch_size is {config.batch_size}")
    built.model.to(device or torch.device("cpu"))
    # 64 samples are enough to measure an activation's inputs. They are the same for any number of processes.
    first = slice(0, min(config.batch_size, 64))
    inputs = built.data.batch(config.seed, 0, config.batch_size, first)[0].to(device or torch.device("cpu"))
    _make_learnable(built.model, config, inputs)
    if config.stock is not None:
        _place_stock(built.model, Stock.parse(config.stock), config, inputs)
    return built


def _custom_model(config: TrainConfig) -> Built:
    assert config.batch_size is not None
    custom = Custom.load(config.model)
    # Whatever the file did while it was loaded, the weights depend on the seed alone.
    torch.manual_seed(config.seed)
    return Built(custom.model(), CustomBatches(custom, config.batch_size), loss=custom.loss)


def _place_stock(model: nn.Module, stock: Stock, config: TrainConfig, inputs: Tensor) -> None:
    exchange_(model, lambda: stock.make(config.gated).to(inputs.device))
    if stock.start == "calibrated":
        calibrate_stock_(model, inputs)


def _language_model(config: TrainConfig) -> Built:
    assert config.data is not None
    if config.start_from is not None:
        loaded = load_pretrained(config.start_from, kind="gpt2", dropout=config.dropout)
        model, notes = loaded.model, loaded.notes
        assert isinstance(model, GPT2)
        _require_gates(model.config.gated, config)
        data = open_data(DataConfig(config.data, context=model.config.context), "tokens")
        if data.vocabulary is not None and data.vocabulary > model.config.vocabulary:
            raise OrthoFxError(
                f"{config.start_from} has a vocabulary of {model.config.vocabulary} tokens, and {config.data} has "
                f"{data.vocabulary}"
            )
    else:
        preset, notes = gpt2.PRESETS[config.size], ()
        data = open_data(DataConfig(config.data, context=preset.context), "tokens")
        vocabulary = data.vocabulary or preset.vocabulary
        model = GPT2(replace(preset, vocabulary=vocabulary, dropout=config.dropout, gated=config.gated))
    # Files of tokens need not state a vocabulary, so the data checks each batch against the model's.
    data.vocabulary = model.config.vocabulary
    return Built(model, data, notes)


def _image_model(config: TrainConfig) -> Built:
    assert config.data is not None
    source = DataConfig(
        config.data,
        image_size=config.image_size,
        augment=config.augment,
        mixup=config.mixup,
        cutmix=config.cutmix,
    )
    data = open_data(source, "images")
    if config.start_from is not None:
        shapes = {"classes": data.classes, "channels": data.channels}
        loaded = load_pretrained(config.start_from, kind="convnext", drop_path=config.drop_path, **shapes)
        assert isinstance(loaded.model, convnext.ConvNeXt)
        _require_gates(loaded.model.config.gated, config)
        return Built(loaded.model, data, loaded.notes)
    preset = replace(convnext.PRESETS[config.size], channels=data.channels, classes=data.classes)
    return Built(convnext.ConvNeXt(replace(preset, drop_path=config.drop_path, gated=config.gated)), data)


def _require_gates(gated: bool, config: TrainConfig) -> None:
    if gated != config.gated:
        has = "has" if gated else "does not have"
        raise OrthoFxError(f"{config.start_from} {has} gated MLPs, and gated is {config.gated} here")


def _make_learnable(model: nn.Module, config: TrainConfig, inputs: Tensor) -> None:
    present = [module.site_config() for module in model.modules() if isinstance(module, Expansion)]
    wanted = config.expansion
    # Our own weights bring learned expansions, which keep their values; so `init` may differ, the rest may not.
    for found in present:
        frozen = found.form is not None
        if wanted is None or replace(found.expansion, init=wanted.init) != wanted or (frozen and not config.freeze):
            has = f"{'frozen ' * frozen}expansions {found.expansion}"
            asked = "none" if wanted is None else f"{wanted}{'' if config.freeze else ', which learn'}"
            raise OrthoFxError(f"{config.start_from} holds {has}, and the run asks for {asked}")
    if wanted is None:
        return
    if not present:
        rewrite_(model, wanted, example_inputs=inputs)
        if config.calibrate:
            calibrate_(model, [inputs])
    if config.freeze and any(isinstance(module, LearnableExpansion) for module in model.modules()):
        freeze_(model)
