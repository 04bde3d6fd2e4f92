"""PEFT: adapters such as LoRA train the expansions of their model, and hold them in their files.

PEFT freezes everything but its own modules, and saves these alone. What it trains as a whole it keeps in a
`ModulesToSaveWrapper`: the module of the base model, and a copy of it for each adapter. After `enable()` an expansion
stands in such a wrapper, so PEFT's own code trains, saves, loads, switches and merges it. "The base model" is always
the model that the adapter was added to. Of a model that was rewritten before, it has the expansions as they were then;
of a model that is rewritten afterwards, it has the activations that they replaced.

`adapter_config.json` gets the configuration of the expansions, so a plain model is rewritten when it loads an adapter.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.activations.freeze import FrozenExpansion
from ortho_fx.config import SiteConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.modules.exchange import exchange
from ortho_fx.passes.revert import revert_expansions
from ortho_fx.passes.vocabulary.expansions import CONFIG_KEY, Expansion, Kept
from ortho_fx.rewriting.adapters import off_rewrite, on_rewrite
from ortho_fx.rewriting.like import check_same, rewrite_like_
from ortho_fx.rewriting.sources import VERSION

try:
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper
except ImportError as error:
    raise OrthoFxError(f"PEFT is not installed, or too old (0.19 is not): pip install -U peft; {error}") from None

# The methods of PEFT that are replaced, with what they were.
_replaced: dict[tuple[type, str], Any] = {}
# The attribute of a config that was read from a file, with what the file says of expansions; {} if it has none. That of
# the name `CONFIG_KEY` is what a file gets.
_READ = "_expansions_read"
# Whether this module rewrites a model itself, and hence knows which adapter gets the expansions.
_attaching: list[bool] = []


def enable() -> None:
    """Has PEFT train and save expansions with its adapters; a second call changes nothing.

    Call it once, before `get_peft_model` and `PeftModel.from_pretrained`. It does not matter whether the model is
    rewritten before `get_peft_model` or after.
    """
    if _replaced:
        return
    for owner, name, around in (
        (BaseTuner, "inject_adapter", _around_inject),
        (BaseTuner, "unload", _around_unload),
        (PeftModel, "__init__", _around_init),
        (PeftModel, "add_adapter", _around_add),
        (PeftModel, "save_pretrained", _around_save),
        (PeftConfig, "to_dict", _around_to_dict),
        (PeftConfig, "from_peft_type", _around_from_peft_type),
    ):
        cls = next(cls for cls in owner.__mro__ if name in vars(cls))
        _replaced[cls, name] = vars(cls)[name]
        setattr(cls, name, around(vars(cls)[name]))
    on_rewrite(_adopt)


def disable() -> None:
    """Undoes `enable`: new adapters leave expansions frozen in their base model, and out of their files."""
    off_rewrite(_adopt)
    for (cls, name), value in _replaced.items():
        setattr(cls, name, value)
    _replaced.clear()


class AdapterExpansion(ModulesToSaveWrapper):
    """What stands in a model with adapters for an expansion: the one of the base model, and one for each adapter.

    Several places that share an expansion have a wrapper each, with the same modules in it.
    """

    @classmethod
    def around(cls, base: nn.Module, adapter: str, expansion: Expansion | None = None) -> AdapterExpansion:
        """A wrapper in which an adapter has this expansion; a copy of the base model's if it is None."""
        wrapper = cls(base, adapter)
        if expansion is not None:
            wrapper.modules_to_save[adapter] = expansion
        return wrapper

    def twin(self) -> AdapterExpansion:
        """The wrapper for another place."""
        other = type(self)(self.original_module, next(iter(self._adapters)))
        other.modules_to_save, other._adapters = self.modules_to_save, self._adapters
        other._active_adapter = self._active_adapter
        return other

    def add(self, adapter: str, expansion: Expansion) -> None:
        """Gives one more adapter an expansion."""
        self._adapters.add(adapter)
        self.modules_to_save[adapter] = expansion.requires_grad_(False)

    def activate(self, adapters: Iterable[str], inference_mode: bool) -> None:
        own = [adapter for adapter in adapters if adapter in self._adapters]
        self.set_adapter(own[:1], inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name, new_active_adapters)
        if was_active and adapter_name in self.active_adapters:  # its twin deleted the module
            left = [name for name in new_active_adapters or () if name in self._adapters]
            self.__dict__["_active_adapter"] = left[0] if left else []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if not merge:
            return self.original_module
        if adapter_names is not None and not set(adapter_names) & set(self.active_adapters):
            chosen = [name for name in adapter_names if name in self._adapters]
            if len(chosen) > 1:
                raise OrthoFxError(f"only one adapter's expansions can be merged; got {', '.join(chosen)}")
            return self.modules_to_save[chosen[0]] if chosen else self.original_module
        return super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)


def _around_inject(inject: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inject)
    def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **named: Any) -> Any:
        with _attached(model, self.peft_config[adapter_name], adapter_name, lambda: self.active_adapters):
            return inject(self, model, adapter_name, *args, **named)

    return inject_adapter


def _around_add(add: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add)
    def add_adapter(self: PeftModel, adapter_name: str, peft_config: PeftConfig, *args: Any, **named: Any) -> Any:
        if not (peft_config.is_prompt_learning or peft_config.is_adaption_prompt):
            return add(self, adapter_name, peft_config, *args, **named)  # through `inject_adapter`
        base: Any = self.base_model if peft_config.is_prompt_learning else self.base_model.model
        with _attached(base, peft_config, adapter_name, lambda: self.active_adapters):
            return add(self, adapter_name, peft_config, *args, **named)

    return add_adapter


def _around_init(init: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init)
    def __init__(
        self: PeftModel,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        *args: Any,
        **named: Any,
    ) -> None:
        if peft_config.is_adaption_prompt:  # the only method that neither adds nor injects its first adapter
            with _attached(model, peft_config, adapter_name, lambda: [adapter_name]):
                init(self, model, peft_config, adapter_name, *args, **named)
        else:
            init(self, model, peft_config, adapter_name, *args, **named)
        left = [name for name, _, _, one in _places(self) if isinstance(one, ExpansionActivation)]
        if left and not _is_plain(peft_config):
            raise OrthoFxError(
                f"{type(peft_config).__name__} has no way to train and save the expansions at {', '.join(left)}: call "
                "ortho_fx.integrations.peft.disable() first to keep them frozen in the base model"
            )

    return __init__


def _around_unload(unload: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(unload)
    def unloading(self: BaseTuner) -> nn.Module:
        # Activations that were replaced after the adapter was added go back where they were.
        gone = set()
        for _, owner, key, wrapper in list(_places(self.model)):
            if isinstance(wrapper, AdapterExpansion) and isinstance(wrapper.original_module, Kept):
                (expansion, *_others) = wrapper.modules_to_save.values()
                exchange(owner, key, expansion)
                gone.add(id(expansion))
        model = unload(self)
        if gone:
            revert_expansions(model, lambda expansion: id(expansion) in gone)
        return model

    return unloading


def _around_save(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_pretrained(self: PeftModel, *args: Any, **named: Any) -> Any:
        missed = [
            name
            for name, _, _, one in _places(self)
            if isinstance(one, Expansion) and any(parameter.requires_grad for parameter in one.parameters())
        ]
        if missed:
            raise OrthoFxError(
                f"the files of the adapter would not have the trained expansions at {', '.join(missed)}: call "
                "ortho_fx.integrations.peft.enable() before get_peft_model, and rewrite_ with the whole model"
            )
        for adapter, config in self.peft_config.items():
            _describe(self.get_base_model(), config, adapter)
        return save(self, *args, **named)

    return save_pretrained


def _around_to_dict(to_dict: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to_dict)
    def with_expansions(self: PeftConfig) -> dict[str, Any]:
        described = vars(self).get(CONFIG_KEY)
        return to_dict(self) | ({CONFIG_KEY: described} if described else {})

    return with_expansions


def _around_from_peft_type(method: Any) -> Any:
    function = method.__func__

    def from_peft_type(cls: Any, **named: Any) -> Any:
        described = named.pop(CONFIG_KEY, {})
        config = function(cls, **named)
        setattr(config, CONFIG_KEY, described)
        setattr(config, _READ, described)
        return config

    named_alike: Any = functools.update_wrapper(from_peft_type, function)
    return classmethod(named_alike)


@contextmanager
def _attached(base: nn.Module, config: Any, adapter: str, active: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Gives an adapter its expansions, before and after PEFT adds it to the base model."""
    described = vars(config).get(_READ)
    new = _rewritten(base, described) if described else []
    made = {id(expansion) for expansion in new}
    names, written = getattr(config, "modules_to_save", None), vars(config).get(CONFIG_KEY)
    if written and names:  # those are ours to wrap; PEFT compares no more than the ends of names
        ours = {name for name in names if _plain(name) in _names(written)}
        config.modules_to_save = [name for name in names if name not in ours] or None
    try:
        yield
    except BaseException:
        if new:
            revert_expansions(base, lambda expansion: id(expansion) in made)
        raise
    if _is_plain(config):
        if any(isinstance(one, ExpansionActivation) for _, _, _, one in _places(base)):
            warnings.warn(
                f"ortho_fx: the expansions of the model stay frozen in the base model, since the file of the adapter "
                f"{adapter} has none; make a new {type(config).__name__} to train them",
                stacklevel=4,
            )
        return
    for _, wrapper in _wrappers(base):
        revert_expansions(wrapper.original_module, lambda expansion: id(expansion) in made)
    _wrap(base, adapter, new, _names(described) if described else None, active(), config.inference_mode)
    _freeze(base, adapter, described["sites"] if described else {})
    _describe(base, config, adapter)


def _is_plain(config: PeftConfig) -> bool:
    """Whether a config was read from a file, and the file has no expansions."""
    return vars(config).get(_READ) == {}


def _names(described: Mapping[str, Any]) -> set[str]:
    return {*described["sites"], *described.get("shared", {})}


def _rewritten(base: nn.Module, described: Mapping[str, Any]) -> list[Expansion]:
    """The expansions that a base model has to get for an adapter that was saved with them."""
    held = {_plain(name): module for name, _, _, module in _places(base)}
    for wrapper_name, wrapper in _wrappers(base):
        for inner, module in wrapper.original_module.named_modules():
            if isinstance(module, Expansion):
                held[f"{_plain(wrapper_name)}.{inner}"] = module
    sites, shared = described["sites"], described.get("shared", {})
    missing = {}
    for name, values in sites.items():
        module = held.get(name)
        if isinstance(module, AdapterExpansion):
            module = _a_like(module)
        if module is None:  # a frozen one learns at first, since it knows then what it replaced
            missing[name] = replace(SiteConfig.from_dict(values), form=None, sizes=()).to_dict()
        else:
            check_same(name, module, SiteConfig.from_dict(values))
    if not missing:
        return []
    earlier = {id(module) for module in base.modules()}
    _attaching.append(True)
    try:
        rest = {name: first for name, first in shared.items() if first in missing}
        rewrite_like_(base, {"version": described.get("version"), "sites": missing, "shared": rest})
    finally:
        _attaching.pop()
    return [module for module in base.modules() if isinstance(module, Expansion) and id(module) not in earlier]


def _a_like(wrapper: AdapterExpansion) -> Expansion:
    """An expansion in a wrapper: the base model's if it has one, and else an adapter's."""
    candidates = [wrapper.original_module, *wrapper.modules_to_save.values()]
    return next(module for module in candidates if isinstance(module, Expansion))


def _wrap(
    base: nn.Module,
    adapter: str,
    new: Sequence[Expansion],
    names: set[str] | None,
    active: Sequence[str],
    inference_mode: bool,
) -> None:
    """Wraps the expansions of a base model for an adapter: those of these names, or all that the base model has."""
    made = {id(expansion) for expansion in new}
    wrappers: dict[int, AdapterExpansion] = {}
    for name, owner, key, module in list(_places(base)):
        if owner._modules[key] is not module or (names is not None and _plain(name) not in names):
            continue
        if isinstance(module, AdapterExpansion):
            if adapter in module._adapters:
                continue
            if isinstance(module.original_module, Expansion):
                module.update(adapter)
                module.modules_to_save[adapter].requires_grad_(False)
            elif names is not None:
                module.add(adapter, copy.deepcopy(_a_like(module)))
            continue
        if not isinstance(module, ExpansionActivation) and names is None:
            continue  # frozen ones have nothing to train
        if id(module) in wrappers:
            wrapper = wrappers[id(module)].twin()
        elif id(module) in made and isinstance(module, Expansion):
            wrapper = AdapterExpansion.around(_kept(module), adapter, module)
        else:
            wrapper = AdapterExpansion.around(module, adapter)
        wrappers.setdefault(id(module), wrapper)
        wrapper.activate(active, inference_mode)
        exchange(owner, key, wrapper)


def _freeze(base: nn.Module, adapter: str, sites: Mapping[str, Any]) -> None:
    """Puts frozen expansions where an adapter was saved with them."""
    for name, _, _, wrapper in _places(base):
        site = SiteConfig.from_dict(sites[_plain(name)]) if _plain(name) in sites else None
        if site is not None and site.form is not None and isinstance(wrapper, AdapterExpansion):
            expansion = wrapper.modules_to_save[adapter]
            if isinstance(expansion, ExpansionActivation):
                wrapper.modules_to_save[adapter] = FrozenExpansion.like(expansion, site)


def _kept(expansion: Expansion) -> Kept:
    """What an expansion replaced."""
    (replaced,) = vars(expansion)["_replaced"]
    if replaced.kind == "module":
        return Kept(replaced.value)
    assert isinstance(expansion, ExpansionActivation)
    assert expansion.reference is not None
    return Kept(expansion.reference)


def _adopt(model: nn.Module, new: Sequence[Expansion]) -> None:
    """Gives the active adapter of a model the expansions of a rewrite."""
    active = [] if _attaching else _active_adapters(model)
    if not active:
        return
    names = {_plain(name) for name, _, _, one in _places(model) if any(one is expansion for expansion in new)}
    _wrap(model, active[0], new, names, active, inference_mode=False)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, Mapping) and active[0] in configs:
        _describe(base, configs[active[0]], active[0])


def _active_adapters(model: nn.Module) -> list[str]:
    if isinstance(model, PeftModel):
        return list(model.active_adapters)
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return next((list(layer.active_adapters) for layer in layers), [])


def _describe(base: nn.Module, config: Any, adapter: str) -> None:
    """Writes into an adapter's config which expansions it has."""
    sites: dict[str, Any] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    paths = []
    for name, _, _, module in _places(base):
        if isinstance(module, AdapterExpansion) and adapter in module._adapters:
            expansion: Any = module.modules_to_save[adapter]
            plain = _plain(name)
            paths.append(name)
            if first.setdefault(id(expansion), plain) == plain:
                sites[plain] = expansion.site_config().to_dict()
            else:
                shared[plain] = first[id(expansion)]
    for name, expansion in _inside_copies(base, adapter):
        sites.setdefault(name, expansion.site_config().to_dict())
    if not sites:
        return
    described = {"version": VERSION, "sites": sites} | ({"shared": shared} if shared else {})
    setattr(config, CONFIG_KEY, described)
    names = getattr(config, "modules_to_save", None) or ()
    if paths and hasattr(config, "modules_to_save"):  # for PEFT without this module
        config.modules_to_save = list(dict.fromkeys([*names, *paths]))


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """The names, owners and keys of expansions and of their wrappers, but for those in what adapters keep already."""
    return _inside("", model)


def _inside(prefix: str, owner: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    for key, child in owner._modules.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(child, AdapterExpansion | Expansion):
            yield name, owner, key, child
        elif child is not None and not isinstance(child, AuxiliaryTrainingWrapper):
            yield from _inside(name, child)


def _inside_copies(base: nn.Module, adapter: str) -> Iterator[tuple[str, Expansion]]:
    """The expansions in larger modules that an adapter keeps as a whole, by their names in the base model."""
    for name, wrapper in _wrappers(base):
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save:
            for inner, module in wrapper.modules_to_save[adapter].named_modules():
                if isinstance(module, Expansion):
                    yield f"{_plain(name)}.{inner}", module


def _wrappers(base: nn.Module) -> Iterator[tuple[str, AuxiliaryTrainingWrapper]]:
    """What keeps larger modules, and what trains a part of one."""
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, AdapterExpansion):
            yield name, module


def _plain(name: str) -> str:
    """The name of a module in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
