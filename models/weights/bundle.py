"""Saves weights as safetensors files that describe their model, and makes the model again from such a file.

The metadata of a file has "format": "pt", which other programs expect, and under "ortho_fx" a JSON object: version,
model, size (the preset of that shape, if there is one), config (the fields of the model's config), expansions (config
by site), channels (number and dimension of the channels, by site, if an expansion differs by channel or group), shared
(the other names of an expansion that stands at several sites, each with the first), parameters (their number), and a
description that the caller gave. Tensors have the names of `state_dict`; a tied one is stored once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx.activations.expansion import make_activation
from ortho_fx.activations.freeze import FrozenExpansion
from ortho_fx.config import SiteConfig, described_sites
from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file, reason
from ortho_fx.models import convnext, gpt2
from ortho_fx.models.convnext import ConvNeXt, ConvNeXtConfig
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.passes.search import find_occurrences
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.targets import choose_targets
from ortho_fx.rewriting.sources import expansion_config
from ortho_fx.tensor_files import (
    errors_naming,
    files_of,
    read_metadata,
    read_safetensors,
    safetensors_library,
    with_digest,
)

VERSION = 1
ModelConfig = GPT2Config | ConvNeXtConfig
# Fields of a model's config for its training or its initialisation; they do not change what it computes.
_TRAINING = ("dropout", "drop_path", "layer_scale")


@dataclass(frozen=True)
class Kind:
    """A kind of model; `tied` maps the name of a tied parameter to the name under which it is stored."""

    model: type[nn.Module]
    config: Callable[..., ModelConfig]
    presets: Mapping[str, ModelConfig]
    tied: Mapping[str, str] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "gpt2": Kind(GPT2, GPT2Config, gpt2.PRESETS, {"head.weight": "tokens.weight"}),
    "convnext": Kind(ConvNeXt, ConvNeXtConfig, convnext.PRESETS),
}


@dataclass(frozen=True)
class Weights:
    """A model as a file holds it: its kind and config, its expansions by site, and its tensors by name.

    `shared` has the other names of expansions that stand at several sites, each with the first.
    """

    kind: str
    config: ModelConfig
    expansions: Mapping[str, SiteConfig]
    state: Mapping[str, Tensor]
    description: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model with these tensors, in their own dtypes, on the CPU and in train mode.

        Raises:
            OrthoFxError: an expansion at a name that is no activation, or tensors that are missing, surplus or of
                another shape.
        """
        kind = KINDS[self.kind]
        # The meta device allocates and initialises nothing; the tensors then become the parameters.
        try:
            with torch.device("meta"):
                model = kind.model(self.config)
        except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise OrthoFxError(f"its config makes no {self.kind}: {reason(error)}") from None
        _place_expansions(model, self.expansions, self.shared)
        fitting(model, kind, self.state)
        model.load_state_dict({**self.state, **_copies(kind, self.state)}, assign=True)
        if isinstance(model, GPT2):
            model.head.weight = model.tokens.weight
        return model


def save_weights(
    model: nn.Module, path: str | Path, description: Mapping[str, Any], state: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the weights of a GPT-2 or ConvNeXt, rewritten or not, to a safetensors file that describes the model.

    Args:
        model: the model itself, outside of any wrapper.
        path: the file; an earlier one is replaced as a whole or stays.
        description: values to store with the weights: anything that JSON can hold.
        state: the tensors by name, if they are not the model's own: a sharded model's full state dict, or an average
            over steps. A tied parameter may be in it once or twice.

    Raises:
        OrthoFxError: a model of another kind, sharded parameters, a state that does not fit, a description that is not
            JSON, or a disk that cannot be written.
    """
    name = kind_of(model)
    kind, state = KINDS[name], dict(model.state_dict() if state is None else state)
    sharded = next((key for key, tensor in state.items() if hasattr(tensor, "device_mesh")), None)
    if sharded is not None:
        raise OrthoFxError(f"{sharded} is sharded over processes: gather the full state dict, and pass it as state=")
    fitting(model, kind, state)
    for copy, original in kind.tied.items():
        tensor = state.pop(copy, state[original])
        if tensor.data_ptr() != state[original].data_ptr() and not torch.equal(tensor, state[original]):
            raise OrthoFxError(f"{copy} differs from {original}, and a {type(model).__name__} has one for both")
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in state.items()}
    metadata = with_digest(tensors, {"format": "pt", "ortho_fx": _describe(name, model, description)})
    safetensors = safetensors_library()
    with atomic_file(Path(path)) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:
            raise _system_error(error) from None


def load_model(path: str | Path) -> nn.Module:
    """The model that `save_weights` wrote, with its expansions, on the CPU and in train mode.

    Raises:
        OrthoFxError: a file without such a model, of another version, or damaged.
    """
    weights = read_weights(Path(path))
    with errors_naming(Path(path)):
        return weights.build()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copies the weights that `save_weights` wrote into a model of the same shape with the same expansions.

    Raises:
        OrthoFxError: a file without such a model, or with another model; `model` is then unchanged.
    """
    weights, name = read_weights(Path(path)), kind_of(model)
    kind, theirs = KINDS[name], {"model": weights.kind, **asdict(weights.config)}
    ours = {"model": name, **asdict(model.config)}  # type: ignore[call-overload]
    different = [
        f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in ours
        if key not in _TRAINING and theirs.get(key) != ours.get(key)
    ]
    if different:
        different = different[:1] if weights.kind != name else different
        raise OrthoFxError(f"{path} is of another model: {', '.join(different)}")
    with errors_naming(Path(path)):
        fitting(model, kind, weights.state)
    model.load_state_dict({**weights.state, **_copies(kind, weights.state)})


def read_weights(path: Path) -> Weights:
    """The content of a file that `save_weights` wrote.

    Raises:
        OrthoFxError: no safetensors file, or one without our description, of another version, or damaged.
    """
    file = read_safetensors(path)
    with errors_naming(path):
        return described(file.tensors, file.metadata)


def described(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Weights:
    """The tensors together with the model that the metadata of their file describe.

    Raises:
        OrthoFxError: metadata that describe no model, are of another version, or are damaged.
    """
    if "ortho_fx" not in metadata:
        raise OrthoFxError(
            "its metadata have no ortho_fx, which says what model it is of; load_pretrained reads layouts of others"
        )
    try:
        values = json.loads(metadata["ortho_fx"])
        version = values["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OrthoFxError(f"its metadata are damaged: {type(error).__name__}, {reason(error)}") from None
    if version != VERSION:
        raise OrthoFxError(f"it has version {version!r} of weights; this release reads version {VERSION}")
    try:
        kind = KINDS[values["model"]]
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in values["config"].items()}
        expansions = described_sites(values["expansions"], values["channels"])
        if not isinstance(values["description"], dict):
            raise TypeError("description must be an object")
        checked = _checked(kind.config(**config), len(tensors))
        shared = {str(name): str(first) for name, first in values.get("shared", {}).items()}
        return Weights(values["model"], checked, expansions, tensors, values["description"], shared)
    except OrthoFxError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise OrthoFxError(f"its metadata are damaged: {type(error).__name__}, {reason(error)}") from None


def run_settings(path: Path) -> Mapping[str, Any]:
    """The settings of the run that made the weights in a file or folder; empty if they are unknown."""
    file = files_of(path)[0]
    if file.suffix != ".safetensors":
        return {}
    description = json.loads(read_metadata(file).get("ortho_fx", "{}")).get("description", {})
    settings = description.get("run") if isinstance(description, dict) else None
    return settings if isinstance(settings, dict) else {}


def _checked(config: ModelConfig, tensors: int) -> ModelConfig:
    """The config, with fields in the range of its model, and no more layers than the file has tensors for."""
    for name, value in asdict(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        rate = name in _TRAINING
        if isinstance(getattr(type(config)(), name), tuple) != isinstance(value, tuple) or not numbers:
            raise OrthoFxError(f"its metadata are damaged: {name} is {value!r}")
        if isinstance(getattr(type(config)(), name), bool):
            if not isinstance(value, bool):
                raise OrthoFxError(f"its metadata are damaged: {name} must be true or false; got {value!r}")
            continue
        for number in numbers:
            whole = type(number) is int and 0 < number < 2**31
            if not (type(number) in (int, float) and math.isfinite(number) if rate else whole):
                kind = "a finite number" if rate else "a whole number from 1 to 2147483647"
                raise OrthoFxError(f"its metadata are damaged: {name} must be {kind}; got {number!r}")
    if isinstance(config, GPT2Config):
        layers = config.layers
        if config.width % config.heads:
            raise OrthoFxError(
                f"its metadata are damaged: width {config.width} is no multiple of the {config.heads} heads"
            )
    else:
        layers = sum(config.depths)
        if len(config.depths) != len(config.widths):
            raise OrthoFxError(f"its metadata are damaged: depths {config.depths} and widths {config.widths} differ")
    if layers > tensors:
        raise OrthoFxError(f"its metadata are damaged: {layers} layers are more than its {tensors} tensors")
    return config


def kind_of(model: nn.Module) -> str:
    """The name of the model's kind.

    Raises:
        OrthoFxError: the model is not one of ours.
    """
    for name, kind in KINDS.items():
        if isinstance(model, kind.model):
            return name
    raise OrthoFxError(f"the model must be a GPT2 or a ConvNeXt; got {type(model).__name__}")


def fitting(model: nn.Module, kind: Kind, state: Mapping[str, Tensor]) -> None:
    """Raises an `OrthoFxError` unless names and shapes are those of the model; tied copies may be missing."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = {
        "missing": [name for name in expected if name not in given and name not in kind.tied],
        "surplus": [name for name in sorted(given) if name not in expected],
        "of another shape": [
            f"{name}, {given[name]} and not {shape}"
            for name, shape in expected.items()
            if name in given and given[name] != shape
        ],
    }
    told = [f"{len(names)} {title} ({shortened(names)})" for title, names in problems.items() if names]
    if told:
        raise OrthoFxError(f"the tensors do not fit this {type(model).__name__}: {'; '.join(told)}")


def shortened(names: Iterable[str]) -> str:
    """The first three names, and dots for the others."""
    names = list(names)
    return ", ".join((*names[:3], *(["..."] if len(names) > 3 else [])))


def _copies(kind: Kind, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {copy: state[original] for copy, original in kind.tied.items()}


def _place_expansions(model: nn.Module, sites: Mapping[str, SiteConfig], shared: Mapping[str, str]) -> None:
    """Places expansions without values at these sites. Unlike `rewrite_`, it need not run the model."""
    found = {occurrence.site.name: occurrence for occurrence in find_occurrences(model, choose_targets(None))}
    for name in (*sites, *shared):
        if name not in found:
            raise OrthoFxError(f"{name} is no activation of this {type(model).__name__}; those are {shortened(found)}")
    made: dict[str, Expansion] = {}
    for name, site in sites.items():
        learnable = make_activation(
            replace(site.expansion, init="stable"),
            channels=site.channels,
            channel_dim=site.channel_dim,
            reference=found[name].reference,
            device="meta",
        )
        learnable.config = site.expansion
        made[name] = learnable if site.form is None else FrozenExpansion.like(learnable, site)
        found[name].substitute(made[name])
    for name, first in shared.items():
        if first not in made:
            raise OrthoFxError(f"its metadata are damaged: {name} is said to share the expansion of {first}")
        found[name].substitute(made[first])


def _describe(name: str, model: nn.Module, description: Mapping[str, Any]) -> str:
    expansions = {site: module for site, module in model.named_modules() if isinstance(module, Expansion)}
    config = asdict(model.config)  # type: ignore[call-overload]
    shared = expansion_config(model).get("shared")
    values = {
        "version": VERSION,
        "model": name,
        "size": _size_of(name, config),
        "config": config,
        "expansions": {site: _without_channels(module.site_config()) for site, module in expansions.items()},
        "channels": {
            site: [module.channels, module.channel_dim]
            for site, module in expansions.items()
            if module.channels is not None
        },
        **({"shared": shared} if shared else {}),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "description": dict(description),
    }
    try:
        return json.dumps(values)
    except (TypeError, ValueError) as error:
        raise OrthoFxError(f"the description of the weights must be plain values for JSON: {error}") from None


def _without_channels(site: SiteConfig) -> dict[str, Any]:
    """The description of an expansion; its channels have a place of their own in the file."""
    return {key: value for key, value in site.to_dict().items() if key not in ("channels", "channel_dim")}


def _size_of(name: str, config: Mapping[str, Any]) -> str | None:
    """The preset with the same fields, except those in `_TRAINING`."""
    for size, preset in KINDS[name].presets.items():
        if all(config[key] == value for key, value in asdict(preset).items() if key not in _TRAINING):
            return size
    return None


def _system_error(error: Exception) -> OSError:
    """The OSError behind an error of safetensors, whose text alone holds its number."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None:
        return OSError(errno.EIO, str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])))
