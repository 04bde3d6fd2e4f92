"""torchtitan: a config switches expansions on, and its parallelism, trainers and checkpoints take them as they are.

torchtitan builds a model from its config on the meta device, distributes it, and gives every parameter its value last.
So the rewrite belongs to the build. Two things put it there, with one effect:

    model_registry("8B", converters=[ExpansionConverter.Config(expansion="hermite3")])
    --override.imports 'ortho_fx.integrations.torchtitan.expansions={"expansion": "hermite3"}'

`prepare_` then makes each expansion a module in torchtitan's sense. Such a module declares how its parameters are
distributed over the mesh, and has a method that sets them. torchtitan does the rest: no plan and no trainer changes,
and `ExpansionParallel` is not needed.

Seen with torchtitan 0.3.0 and PyTorch 2.15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import spmd_types
import torch
from torch import nn
from torchtitan.config.override import override
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.protocols.model import BaseModel, ModelConfigConverter
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig
from torchtitan.tools.logging import logger

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.config import ExpansionConfig, configs_of
from ortho_fx.errors import OrthoFxError
from ortho_fx.rewriting.rewrite import rewrite_

Expansions = ExpansionConfig | str | Mapping[str, Any]


class ExpansionConverter(ModelConfigConverter):
    """Lets the config of a model build it with expansions, for `model_registry(..., converters=[...])`.

    Args:
        config.expansion: an `ExpansionConfig`, a name such as "hermite3", a map of fields, or a map from patterns of
            site names to these, as `rewrite_` takes them. None is `ExpansionConfig()`.
        config.targets: activation functions by name, as `rewrite_` takes them.

    Raises:
        OrthoFxError: a wrong setting, one that needs a batch to run, or, when the model is built, what `rewrite_`
            raises.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        expansion: Expansions | None = None
        targets: list[str] | None = None

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: Module.Config) -> Module.Config:
        return expansions(model_config, expansion=self.config.expansion, targets=self.config.targets)


@override(target=BaseModel.Config, description="learnable expansions in the place of activations")
def expansions(
    model_config: Module.Config, *, expansion: Expansions | None = None, targets: list[str] | None = None
) -> Module.Config:
    """Lets the config of a model build it with expansions; the override that `override.imports` names.

    Args and errors are those of `ExpansionConverter`. The config stays the same object: torchtitan's trainer builds
    the model from the object that it had before the overrides.
    """
    chosen = configs_of(expansion)
    for config in chosen.values() if isinstance(chosen, Mapping) else (chosen or ExpansionConfig(),):
        _check_is_known_before_the_data(config)
    if issubclass(type(model_config), _BuildsExpansions):
        raise OrthoFxError(
            f"the config of {model_config._owner.__name__} builds expansions already: ask for them once, by the "
            "override or by the converter"
        )
    model_config.__class__ = _config_class(type(model_config), chosen, targets)
    return model_config


class _BuildsExpansions:
    """What a config that builds a model with expansions is known by."""

    __slots__ = ()


def _config_class(base: type[Module.Config], chosen: Any, targets: list[str] | None) -> type[Module.Config]:
    """A class of configs like `base`, without fields of its own, whose models have expansions."""

    def build(self: Module.Config, **keywords: Any) -> nn.Module:
        model = base.build(self, **keywords)
        # The build runs on the meta device and in the dtype of the training. The passes evaluate functions.
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                report = rewrite_(model, chosen, targets=targets)
        finally:
            torch.set_default_dtype(before)
        logger.info("Expansions in the place of activations:\n%s", report)
        return prepare_(model)

    def to_dict(self: Module.Config) -> dict[str, Any]:
        return {**base.to_dict(self), "expansions": _plain(chosen)}

    members = {"__slots__": (), "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (_BuildsExpansions, base), {**members, "build": build, "to_dict": to_dict})


def _plain(chosen: Any) -> Any:
    if isinstance(chosen, ExpansionConfig):
        return chosen.to_dict()
    return {pattern: _plain(one) for pattern, one in chosen.items()} if isinstance(chosen, Mapping) else None


_ONE_A_MODEL = (
    "granularity 'model' shares one expansion over all blocks, and torchtitan shards each block by itself: choose "
    "granularity 'layer'"
)


def _check_is_known_before_the_data(config: ExpansionConfig | None) -> None:
    """Raises an `OrthoFxError` for a setting that has to see inputs of the model."""
    if config is None:
        return
    if config.init == "calibrated":
        raise OrthoFxError(
            "init 'calibrated' measures inputs, and torchtitan builds the model on the meta device: choose "
            "init 'stable', and call calibrate_(trainer.model_parts[0], batches) before the training"
        )
    if config.granularity == "model":
        raise OrthoFxError(_ONE_A_MODEL)
    if config.by_channel:
        raise OrthoFxError(
            f"granularity {config.granularity!r} needs the channels of each site, which torchtitan's build does not "
            "know: choose granularity 'layer'"
        )


def prepare_(model: nn.Module) -> nn.Module:
    """Makes the expansions of a model modules in torchtitan's sense, in place, for a model that `rewrite_` rewrote.

    Call it before torchtitan's own parallelisation. `ExpansionConverter` and the override call it by themselves. Every
    process holds all coefficients. The processes along a dimension of tensor, sequence or context parallelism hold
    different elements, so the gradient is declared a sum over that dimension.

    Raises:
        OrthoFxError: expansions per channel or group, of which a process needs those of its channels; one expansion
            for all blocks; a model without expansions.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, ExpansionActivation)]
    if not found:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion: call rewrite_ first")
    for name, module in found:
        if module.config.granularity == "model":
            raise OrthoFxError(_ONE_A_MODEL)
        if module.channels is not None:
            raise OrthoFxError(
                f"{name} has granularity {module.config.granularity!r}: torchtitan distributes the channels, and every "
                "process would need the expansions of its own: choose granularity 'layer'"
            )
    experts = {id(one) for module in model.modules() if isinstance(module, GroupedExperts) for one in module.modules()}
    for _, module in found:
        if not isinstance(module, Module):
            module.__class__ = _module_class(type(module))
            module._is_in_experts = id(module) in experts  # type: ignore[assignment]
            held = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
            module._sharding_config = ShardingConfig(
                state_shardings={name: dense_param_placement(tp=spmd_types.R) for name in held}
            )
    return model


_MODULE_CLASSES: dict[type[ExpansionActivation], type[ExpansionActivation]] = {}


def _module_class(cls: type[ExpansionActivation]) -> type[ExpansionActivation]:
    """A class of expansions that are modules in torchtitan's sense; pickle and copy know it by `cls`."""
    if cls in _MODULE_CLASSES:
        return _MODULE_CLASSES[cls]

    def reduce_ex(self: ExpansionActivation, protocol: Any) -> Any:
        return _blank, (cls,), *cls.__reduce_ex__(self, protocol)[2:]

    def parallelize(self: ExpansionActivation, parallel_dims: ParallelDims) -> None:
        if self._is_in_experts and max(parallel_dims.tp, parallel_dims.ep) > 1:
            raise OrthoFxError(
                f"{self.called} is inside of experts, whose tokens torchtitan distributes in another way: leave it out "
                'by its name, {"*.routed_experts.*": None, "*": ...}, or take neither tensor nor expert parallelism'
            )
        Module.parallelize(self, parallel_dims)

    members = {"__module__": cls.__module__, "__reduce_ex__": reduce_ex, "parallelize": parallelize}
    return _MODULE_CLASSES.setdefault(cls, type(cls.__name__, (cls, Module), members))


def _blank(cls: type[ExpansionActivation]) -> ExpansionActivation:
    """An expansion without state, for pickle to fill."""
    made = _module_class(cls)
    return made.__new__(made)
