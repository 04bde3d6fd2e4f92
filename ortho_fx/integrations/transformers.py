"""transformers: `save_pretrained` and `from_pretrained` keep expansions, configs name them, and its Trainer knows them.

The extension point of transformers for a model whose modules are not those of its class is a quantization method:
`from_pretrained` lets it change the model, still on the meta device, before the weights are loaded. `enable` registers
the method "ortho_fx". It only acts there: the loaded model is not a quantized one, and its config is as it was before.
config.json gets the expansions at the moment of saving, so it describes the model that is saved.

A transformers that does not know a quantization method skips it with a line in the log. The entry in config.json holds
two more values, which it cannot skip. They belong to the oldest method that it reads before the name, and one is no
value of that method: a sentence that the error then repeats.

What the Trainer needs stands in `transformers_trainer.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ortho_fx.activations.expansion import ExpansionActivation, make_activation
from ortho_fx.activations.freeze import FrozenExpansion
from ortho_fx.bases import BASES
from ortho_fx.config import ExpansionConfig, SiteConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.integrations.transformers_trainer import ExpansionCallback, ExpansionTrainerMixin
from ortho_fx.operators.support import in_a_thread
from ortho_fx.passes.vocabulary.expansions import Expansion, Replaced, remember
from ortho_fx.rewriting.like import rewrite_like_
from ortho_fx.rewriting.sources import VERSION, expansion_config, expansion_keys, read_source

__all__ = ["ExpansionCallback", "ExpansionTrainerMixin", "enable"]

METHOD = "ortho_fx"
_KEY = "quantization_config"
_ADVICE = (
    "ortho_fx: this model has learnable activations: install ortho_fx, and call "
    "ortho_fx.integrations.transformers.enable() before from_pretrained"
)
# What a transformers without ortho_fx cannot skip.
_LOCK = {"load_in_8bit": True, "bnb_4bit_compute_dtype": _ADVICE}
_LOCKED = "bitsandbytes_8bit"
_TWO_METHODS = (
    "the checkpoint has expansions, and is loaded without another quantization_config: load it, and quantize the model "
    "that was loaded"
)
_OLDEST = (4, 53)
_SHOWN = 3


def enable() -> None:
    """Makes expansions at home in transformers; a second call adds the bases that were registered since the first.

    From then on:
    - `save_pretrained` writes the expansions of a rewritten model into config.json, and `from_pretrained` makes them
      before it loads the weights. It raises an OrthoFxError where a file and a model do not fit.
    - The names of bases, alone or with a degree ("hermite", "fourier4"), are activations of transformers: a config may
      have them, as in `LlamaConfig(hidden_act="hermite3")`.
    - `TrainingArguments(torch_compile_backend="ortho_fx")` is accepted, where accelerate is installed.

    Raises:
        OrthoFxError: a release of transformers before 4.53, which does not tell which weights a file lacks.
    """
    if tuple(map(int, transformers.__version__.split(".")[:2])) < _OLDEST:
        raise OrthoFxError(
            f"transformers is {transformers.__version__}, and from_pretrained makes expansions from "
            f"{'.'.join(map(str, _OLDEST))} on: pip install -U transformers"
        )
    for known, basis in BASES.items():
        for name in (known, *(f"{known}{degree}" for degree in basis.degrees)):
            if name not in ACT2FN:
                ACT2FN[name] = (make_activation, {"config": ExpansionConfig.of(name)})
    _accept_backend()
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(METHOD)(ExpansionsConfig)
    register_quantizer(METHOD)(ExpansionsQuantizer)
    AUTO_QUANTIZATION_CONFIG_MAPPING[_LOCKED] = _unlocked(AUTO_QUANTIZATION_CONFIG_MAPPING[_LOCKED])
    model = transformers.PreTrainedModel
    model.save_pretrained = _saving(model.save_pretrained)
    model.from_pretrained = classmethod(_loading(model.from_pretrained.__func__))


class ExpansionsConfig(QuantizationConfigMixin):
    """The entry of config.json: the map of `expansion_config`."""

    def __init__(self, quant_method: str = METHOD, **described: Any) -> None:
        self.quant_method = METHOD
        self.described = {key: value for key, value in described.items() if key not in _LOCK}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, **_LOCK, **self.described}


class ExpansionsQuantizer(HfQuantizer):
    """Makes the expansions of a checkpoint in a model that `from_pretrained` is about to fill."""

    requires_parameters_quantization = False  # for releases that ask
    is_trainable = True
    is_qat_trainable = True

    def is_serializable(self, **keywords: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **keywords: Any) -> None:
        described = self.quantization_config.described
        _check_described(described)
        described = _for_model(described, model)
        _share(model, described.get("shared", {}))
        _replace_built_in(model, described["sites"])
        if described["sites"]:
            # The device of new tensors is set to meta here, also of those that tell an activation by its values.
            in_a_thread(lambda: rewrite_like_(model, described))

    def _process_model_after_weight_loading(self, model: nn.Module, **keywords: Any) -> nn.Module:
        return model


def _unlocked(known: Any) -> type:
    """The class that reads entries with `_LOCK`: ours, and those of the method that the lock belongs to."""

    class Unlocked(known):
        @classmethod
        def from_dict(cls, values: Mapping[str, Any], *args: Any, **keywords: Any) -> Any:
            own = ExpansionsConfig if values.get("quant_method") == METHOD else known
            return own.from_dict(values, *args, **keywords)

    return Unlocked


def _check_described(described: Mapping[str, Any]) -> None:
    try:
        read_source(described)
    except OrthoFxError:
        sites = described.get("sites")
        named = {name: site.get("basis") for name, site in sites.items()} if isinstance(sites, Mapping) else {}
        unknown = [name for name, basis in named.items() if basis not in BASES]
        if described.get("version") != VERSION or not unknown:
            raise
        raise OrthoFxError(
            f"the checkpoint has the basis {named[unknown[0]]!r} at {_some(unknown)}, and known here are "
            f"{', '.join(BASES)}: call ortho_fx.register_basis before from_pretrained"
        ) from None


def _for_model(described: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """The map with the names of this model, which may be the base of the saved one or have another head.

    As with weights, what belongs to a module that this model does not have is left out.
    """
    sites, shared = described["sites"], described.get("shared", {})
    here = {name for name, _ in model.named_modules(remove_duplicate=False)}
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    base = model.base_model_prefix

    def own_name(name: str) -> str | None:
        for candidate in (name, name.removeprefix(f"{base}."), f"{base}.{name}"):
            owner = candidate.rpartition(".")[0]
            if owner in here and (owner or same_class or hasattr(model, candidate)):
                return candidate
        return None

    names = {name: own for name in (*sites, *shared) if (own := own_name(name)) is not None}
    found = {names[name]: site for name, site in sites.items() if name in names}
    aliases: dict[str, str] = {}
    for name, first in shared.items():
        if name not in names or first not in sites:
            continue
        if first in names:
            aliases[names[name]] = names[first]
        else:  # only the other place is in this model
            names[first] = names[name]
            found[names[name]] = sites[first]
    return {**described, "sites": found} | ({"shared": aliases} if shared else {})


def _share(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Puts one activation in places that share an expansion, where the saved model had been changed to that."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, first in shared.items():
        if name in modules and first in modules:
            own, other = modules[name], modules[first]
            if type(own) is type(other) and not [*own.parameters()]:
                owner, _, key = name.rpartition(".")
                modules[owner]._modules[key] = other


def _replace_built_in(model: nn.Module, sites: Mapping[str, Any]) -> None:
    """Replaces the expansions that the model has because its config names them, and that were others when saved."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, described in sites.items():
        old, site = modules.get(name), SiteConfig.from_dict(described)
        if not isinstance(old, ExpansionActivation) or old.site_config() == site:
            continue
        new: Expansion = old
        if old.config != site.expansion or old.channels != site.channels:
            first = next(old.parameters())
            new = make_activation(
                replace(site.expansion, init="stable"),
                channels=site.channels, channel_dim=site.channel_dim, device=first.device, dtype=first.dtype,
            )  # fmt: skip
            new.config, new.site = site.expansion, name
            remember(new, Replaced("module", old))
        if site.form is not None:
            assert isinstance(new, ExpansionActivation)
            new = FrozenExpansion.like(new, site)
        owner, _, key = name.rpartition(".")
        modules[owner]._modules[key] = new


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **keywords: Any) -> Any:
        with _described(self):
            return save(self, *args, **keywords)

    return save_pretrained


@contextmanager
def _described(model: Any) -> Iterator[None]:
    """Has the expansions of a model in its config for a while."""
    config, entry = model.config, _entry(model)
    had = _KEY in vars(config)
    kept = getattr(config, _KEY, None)
    if kept is not None and not _is_ours(kept):
        if entry is not None and not getattr(model, "_hf_peft_config_loaded", False):
            method = kept.get("quant_method") if isinstance(kept, Mapping) else getattr(kept, "quant_method", None)
            raise OrthoFxError(
                f"{type(model).__name__} is quantized ({getattr(method, 'value', method)}), and config.json describes "
                "either that or expansions: keep the expansions by ortho_fx.save_expansions(model, path), and after "
                "from_pretrained of the quantized model call ortho_fx.rewrite_like_(model, path)"
            )
        yield
        return
    if entry is not None:
        setattr(config, _KEY, entry)
    elif kept is not None:
        delattr(config, _KEY)
    try:
        yield
    finally:
        if had:
            setattr(config, _KEY, kept)
        elif entry is not None:
            delattr(config, _KEY)


def _entry(model: nn.Module) -> dict[str, Any] | None:
    """What config.json has to say of a model; None where its other values say everything."""
    if all(_is_built_in(module) for module in model.modules() if isinstance(module, Expansion)):
        return None
    return {"quant_method": METHOD, **_LOCK, **expansion_config(model)}


def _is_built_in(expansion: Expansion) -> bool:
    """Whether the model's own code makes this expansion, because its config names it."""
    return isinstance(expansion, ExpansionActivation) and not hasattr(expansion, "_replaced")


def _is_ours(entry: object) -> bool:
    return isinstance(entry, ExpansionsConfig) or (isinstance(entry, Mapping) and entry.get("quant_method") == METHOD)


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, output_loading_info: bool = False, **keywords: Any) -> Any:
        other = keywords.get(_KEY) is not None and not _is_ours(keywords[_KEY])
        try:
            model, info = load(cls, *args, output_loading_info=True, **keywords)
        except ValueError as error:
            if other and ExpansionsConfig.__name__ in str(error):
                raise OrthoFxError(_TWO_METHODS) from None
            raise
        if other and _is_ours(getattr(model.config, _KEY, None)):  # releases that only warn
            raise OrthoFxError(_TWO_METHODS)
        _forget_method(model)
        _check_loaded(model, info or {})
        return (model, info) if output_loading_info else model

    return from_pretrained


def _forget_method(model: Any) -> None:
    """Makes the loaded model one that is not quantized."""
    if not _is_ours(getattr(model.config, _KEY, None)):
        return
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            for name in ("hf_quantizer", "is_quantized", "quantization_method"):
                vars(module).pop(name, None)
            for name in (_KEY, "_is_quantized", "_pre_quantization_dtype"):
                vars(module.config).pop(name, None)


def _check_loaded(model: nn.Module, info: Mapping[str, Any]) -> None:
    """Initialises expansions that a config names and no file has; raises where others were not loaded."""
    mismatched = (key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys", ()))
    missing = {*info.get("missing_keys", ()), *mismatched}
    seen: set[int] = set()
    without = {}
    for name, module in model.named_modules():
        if isinstance(module, Expansion) and id(module) not in seen:
            seen.add(id(module))
            keys = {f"{name}.{key}" for key in module.state_dict()}
            if keys & missing:
                without[name] = keys <= missing and _is_built_in(module) and module
    for module in without.values():
        if isinstance(module, ExpansionActivation):
            module.reset_parameters()
    lost = [name for name, module in without.items() if not module]
    if lost:
        raise OrthoFxError(
            f"the files lack values of the expansions at {_some(lost)}, which config.json describes: save the model "
            "again by save_pretrained, or remove quantization_config from config.json to load it without expansions"
        )
    unexpected = expansion_keys(sorted(info.get("unexpected_keys", ())))
    undescribed = [
        name for name in dict.fromkeys(key.rpartition(".")[0] for key in unexpected) if _is_site(model, name)
    ]
    if undescribed:
        raise OrthoFxError(
            f"the files have expansions at {_some(undescribed)}, which config.json does not describe, because enable() "
            "was not called before they were saved: make the model with from_config, call "
            "ortho_fx.rewrite_like_(model, checkpoint), load the state dict, and save it again"
        )


def _is_site(model: nn.Module, name: str) -> bool:
    """Whether an expansion may stand in this place; a module with parameters there is anyone's."""
    owner, _, key = name.rpartition(".")
    try:
        held = getattr(model.get_submodule(owner), key, None)
    except AttributeError:
        return False
    if isinstance(held, nn.Module):
        return not [*held.parameters()]
    return callable(held) or "_expansion_" in key


def _some(names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")


def _accept_backend() -> None:
    """Lets accelerate, which knows the backends of `torch.compile` by a list, take ours."""
    with suppress(ImportError):
        from accelerate.utils import DynamoBackend

        name = METHOD.upper()
        if name not in DynamoBackend.__members__:
            member = str.__new__(DynamoBackend, name)
            member._name_, member._value_ = name, name
            DynamoBackend._member_map_[name] = DynamoBackend._value2member_map_[name] = member
            DynamoBackend._member_names_.append(name)
