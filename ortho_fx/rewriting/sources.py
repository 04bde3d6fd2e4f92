"""Where the configuration of expansions comes from: a map, a state dict, files of weights, or another model.

The state dict of a rewritten model has the config of each expansion in its metadata, next to the version numbers of
PyTorch, and `torch.save` keeps it. A file of plain tensors has only names and shapes. These say which basis, degree and
clamp an expansion has: no two bases of ortho_fx have the same parameters.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx.bases import BASES, Basis
from ortho_fx.config import ExpansionConfig, SiteConfig, described_sites
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.vocabulary.expansions import CONFIG_KEY, Expansion
from ortho_fx.passes.vocabulary.sites import COMPILED, plain_name
from ortho_fx.tensor_files import errors_naming, files_of, read_json, read_metadata, read_tensors

VERSION = 1
# Keys under which other libraries store the map in a larger one.
_NESTED = ("expansions", "ortho_fx", "quantization_config")


@dataclass(frozen=True)
class Source:
    """The expansions that a source describes.

    Attributes:
        sites: the config of each, by its qualified name; one that stands in several places has several names.
        shared: the other names of expansions that stand in several places, each with the first name.
        tensors: parameters and buffers by qualified names, if the source has values.
        granular: names of expansions that differ by channel or group, and whose channels the source does not tell.
        tells_shared: whether `shared` is complete; names and shapes do not tell it.
    """

    sites: Mapping[str, SiteConfig]
    shared: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] | None = None
    granular: tuple[str, ...] = ()
    tells_shared: bool = True

    def values_of(self, name: str) -> dict[str, Tensor]:
        """The tensors of one expansion, by their names in it."""
        for start in (f"{name}.", f"{self.shared.get(name, name)}."):
            found = {key.removeprefix(start): value for key, value in self._tensors(start)}
            if found:
                return found
        return {}

    def may_share(self, names: Iterable[str]) -> bool:
        """Whether one expansion may stand at all of these names."""
        if self.tells_shared:
            return len({self.shared.get(name, name) for name in names}) == 1
        first, *others = ((self.sites[name], self.values_of(name)) for name in names)
        return all(site == first[0] and _equal(values, first[1]) for site, values in others)

    def _tensors(self, start: str) -> Iterable[tuple[str, Tensor]]:
        return ((key, value) for key, value in (self.tensors or {}).items() if key.startswith(start))


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


def expansion_config(model: nn.Module) -> dict[str, Any]:
    """The configuration of all expansions of a model, as plain values that JSON can hold.

    `rewrite_like_` makes the same expansions in a fresh model. Wrappers (DDP, FSDP, `torch.compile`) leave no trace in
    the names.

    Returns:
        A map with "version", "sites" (the fields of `ExpansionConfig` for each site, with the number and the dimension
        of channels where they matter, and the form of a frozen expansion) and, if expansions stand in several places,
        "shared" (each other name with the first).

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> report = rewrite_(model, "fourier3")
        >>> expansion_config(model)["sites"]["1"]["basis"]
        'fourier'
    """
    sites: dict[str, Any] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for prefix, module in unwrapped(model).named_modules(remove_duplicate=False):
        if isinstance(module, Expansion):
            name = plain_name(prefix)
            if first.setdefault(id(module), name) == name:
                sites[name] = module.site_config().to_dict()
            else:
                shared[name] = first[id(module)]
    return {"version": VERSION, "sites": sites} | ({"shared": shared} if shared else {})


def read_source(source: object) -> Source:
    """The expansions that a map of `expansion_config`, a state dict, a file or another model describes.

    Raises:
        OrthoFxError: none of these, a file that cannot be read, or a source without expansions.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        with errors_naming(path):
            return _of_file(path)
    if isinstance(source, nn.Module):
        found = _of_config(expansion_config(source))
        return replace(found, tensors=plain_names(unwrapped(source).state_dict()))
    if not isinstance(source, Mapping):
        raise OrthoFxError(
            "source must be a map of expansion_config, a state dict, the path of a file, or a model; "
            f"got {type(source).__name__}"
        )
    return _of_map(source)


def plain_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with the names of the model inside wrappers."""
    named = {plain_name(key): value for key, value in state.items()}
    if named and all(key.startswith("module.") for key in named):  # DDP
        return {key.removeprefix("module."): value for key, value in named.items()}
    return named


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP and `torch.compile`."""
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif COMPILED in model._modules:
            model = model.get_submodule(COMPILED)
        else:
            return model


def _of_map(values: Mapping[Any, Any]) -> Source:
    for key in _NESTED:
        if "sites" not in values and isinstance(values.get(key), Mapping):
            return _of_map(values[key])
    if "sites" in values:
        return _of_config(values)
    for key in ("state_dict", "model", "module", "model_state_dict"):
        if isinstance(values.get(key), Mapping):
            return _of_map(values[key])
    return _of_state(values)


def _of_config(values: Mapping[str, Any]) -> Source:
    version, sites, shared = values.get("version"), values["sites"], values.get("shared", {})
    if version != VERSION:
        raise OrthoFxError(
            f"the configuration of expansions has version {version!r}; this release reads version {VERSION}: "
            "update ortho_fx"
        )
    if not isinstance(sites, Mapping) or not isinstance(shared, Mapping):
        raise OrthoFxError("sites and shared must be maps by the names of the expansions")
    found = {}
    for name, described in sites.items():
        try:
            found[str(name)] = SiteConfig.from_dict(described)
        except OrthoFxError as error:
            raise OrthoFxError(f"{name}: {error}") from None
    strangers = [f"{name}: {first}" for name, first in shared.items() if first not in found]
    if strangers:
        raise OrthoFxError(f"shared names expansions that are not among the sites: {', '.join(strangers)}")
    return _some(Source(found | {name: found[first] for name, first in shared.items()}, dict(shared)))


def _of_state(state: Mapping[str, Any]) -> Source:
    other = next((f"{key} is a {type(value).__name__}" for key, value in state.items() if not _is_value(value)), None)
    if other is not None:
        raise OrthoFxError(f"the map is neither that of expansion_config nor a state dict: {other}")
    metadata = plain_names(getattr(state, "_metadata", {}))
    tensors = plain_names(state)
    told = {
        name: held[CONFIG_KEY] for name, held in metadata.items() if isinstance(held, Mapping) and CONFIG_KEY in held
    }
    if not told:
        return _some(_of_names(tensors))
    shared = {name: described["same_as"] for name, described in told.items() if "same_as" in described}
    sites = {name: described for name, described in told.items() if name not in shared}
    shared = {plain_name(name): plain_name(first) for name, first in shared.items()}
    return replace(_of_config({"version": VERSION, "sites": sites, "shared": shared}), tensors=tensors)


def _is_value(value: object) -> bool:
    # A state dict may hold the extra state of modules, which can be anything that is no map.
    return not isinstance(value, Mapping | nn.Module)


def _of_file(path: Path) -> Source:
    if path.is_dir() and not any(path.glob("*.safetensors")) and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        return _of_map(read_json(path))
    files = files_of(path)
    described = next(filter(None, map(_inside, files)), None) or _beside(path / "config.json")
    only = expansion_keys if described is None else partial(_keys_of, described)
    held = [read_tensors(file, only=only) for file in files]
    state = plain_names({key: value for one in held for key, value in one.tensors.items()})
    if described is not None:
        return replace(described, tensors=state)
    if len(held) == 1:
        return _of_state(held[0].tensors)
    return _some(_of_names(state))


def _inside(path: Path) -> Source | None:
    """The expansions that the metadata of a safetensors file describe."""
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    if CONFIG_KEY not in metadata:
        return None
    try:
        return _some(_of_metadata(json.loads(metadata[CONFIG_KEY])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OrthoFxError(f"its metadata do not describe expansions: {error}") from None


def _beside(path: Path) -> Source | None:
    """The expansions that the config.json in a folder of weights describes."""
    values = read_json(path) if path.is_file() else {}
    described = any(isinstance(values.get(key), Mapping) and "sites" in values[key] for key in _NESTED)
    return _of_map(values) if described else None


def _keys_of(source: Source, names: Iterable[str]) -> list[str]:
    """Those of the names of a state dict that belong to the expansions, frozen ones as well."""
    owners = ((name, plain_name(name).rpartition(".")[0]) for name in names)
    return [name for name, owner in owners if owner in source.sites or owner.removeprefix("module.") in source.sites]


def _of_metadata(values: Mapping[str, Any]) -> Source:
    if "sites" in values:
        return _of_config(values)
    # The files of `ortho_fx.models.weights`.
    return _some(Source(described_sites(values.get("expansions", {}), values.get("channels", {}))))


def _some(source: Source) -> Source:
    if not source.sites:
        raise OrthoFxError("it holds no expansions: rewrite_ makes them")
    return source


def expansion_keys(names: Iterable[str]) -> list[str]:
    """Those of the names of a state dict that belong to modules with the parameters of a basis, and nothing more."""
    return [f"{prefix}.{key}" if prefix else key for prefix, keys in _by_module(names).items() for key in keys]


def _by_module(names: Iterable[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        prefix, _, key = name.rpartition(".")
        grouped.setdefault(prefix, []).append(key)
    return {prefix: keys for prefix, keys in grouped.items() if _bases(keys)}


def _bases(keys: Iterable[str]) -> list[Basis]:
    own = set(keys) - {"bounds"}
    return [basis for basis in BASES.values() if own == {parameter.name for parameter in basis.parameters}]


def _of_names(tensors: Mapping[str, Any]) -> Source:
    """The expansions in a state dict that tells only names and shapes."""
    sites: dict[str, SiteConfig] = {}
    granular = []
    for prefix, keys in _by_module(tensors).items():
        values = {key: tensors[f"{prefix}.{key}" if prefix else key] for key in keys}
        if not all(isinstance(value, Tensor) for value in values.values()):
            continue
        try:
            config = config_of_tensors(values)
        except OrthoFxError as error:
            raise OrthoFxError(f"{prefix}: {error}: pass the map of expansion_config") from None
        if config is not None:
            sites[prefix] = SiteConfig(replace(config, granularity="layer"))
            if config.granularity != "layer":
                granular.append(prefix)
    return Source(sites, tensors=tensors, granular=tuple(granular), tells_shared=False)


def config_of_tensors(values: Mapping[str, Tensor]) -> ExpansionConfig | None:
    """The config of an expansion with parameters of these names and shapes; None if it is that of no basis.

    The init cannot be told, and is "stable". The clamp is half the distance of the bounds. Several expansions in one
    are "group:N".

    Raises:
        OrthoFxError: several bases have such parameters.
    """
    shapes = {key: tuple(value.shape) for key, value in values.items()}
    bounds = shapes.pop("bounds", None)
    columns = {shape[1:] for shape in shapes.values()}
    if bounds not in (None, (2,)) or len(columns) != 1 or {len(shape) for shape in shapes.values()} not in ({1}, {2}):
        return None
    ((*groups,),) = columns
    granularity = f"group:{groups[0]}" if groups else "layer"
    clamp = None if bounds is None else _half_width(values["bounds"])
    fitting: dict[str, ExpansionConfig] = {}
    for basis in _bases(values):
        for tied, degree in itertools.product((False, True)[: 1 + basis.tieable], basis.degrees):
            if all(one.size(degree, tied) == shapes[one.name][0] for one in basis.parameters):
                config = ExpansionConfig(basis.name, degree, "stable", granularity, clamp, tied)
                fitting.setdefault(basis.name, config)
    if len(fitting) > 1:
        names = ", ".join(f"{name} {shape[0]}" for name, shape in shapes.items())
        raise OrthoFxError(f"parameters of these names and lengths ({names}) fit several bases: {', '.join(fitting)}")
    return next(iter(fitting.values()), None)


def _half_width(bounds: Tensor) -> float:
    """What the clamp is if the expansion was made for N(0, 1); the bounds themselves are among the tensors."""
    if bounds.is_meta:
        return 1.0
    return max(float(bounds[1] - bounds[0]) / 2, torch.finfo(bounds.dtype).tiny)
