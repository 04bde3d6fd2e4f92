"""`rewrite_like_`: makes in a fresh model the expansions that another one has."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.activations.freeze import FrozenExpansion
from ortho_fx.arguments import checked_model
from ortho_fx.batches import Batch
from ortho_fx.config import PRESET, ExpansionConfig, SiteConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.preset import presets
from ortho_fx.passes import pipeline
from ortho_fx.passes.context import SHARINGS
from ortho_fx.passes.groups import group_of
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.revert import revert_expansions
from ortho_fx.passes.search import list_occurrences
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.sites import plain_name
from ortho_fx.passes.vocabulary.targets import BY_NAME
from ortho_fx.rewriting.adapters import adapters_that_miss, tell
from ortho_fx.rewriting.late import watch_optimizers
from ortho_fx.rewriting.rewrite import RewriteReport
from ortho_fx.rewriting.sources import Source, read_source
from ortho_fx.sharded import is_sharded, whole


def rewrite_like_(
    model: nn.Module,
    source: Mapping[str, Any] | str | Path | nn.Module,
    *,
    example_inputs: Batch | None = None,
) -> RewriteReport:
    """Replaces the activations of a fresh model as those of another one were replaced, in place.

    Afterwards the model takes the other's state dict. If the source has the values of the expansions, they are loaded;
    all other parameters keep theirs. Expansions that the model has already stay, if they are the same. A source whose
    names all have one prefix more or less than the model's ("model.layers.0.act" for "layers.0.act") fits too.

    Args:
        model: a model like the one that was rewritten, before its activations were replaced.
        source: the map of `expansion_config`; a state dict, also one inside of a checkpoint; a file of these (.json,
            .safetensors, .pt, .pth, .bin) or a folder of weights; or a rewritten model.
        example_inputs: as in `rewrite_`. Only expansions per channel or group need it, from a source of names and
            shapes alone, and init="calibrated" without values.

    Returns:
        Every activation of the model; those that the other model kept as they were are left.

    Raises:
        OrthoFxError: a source that cannot be read or has no expansions, sites that the model does not have or that it
            has replaced by something else, a basis that is not known here, or a model that cannot be rewritten. The
            model is then unchanged.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> report = rewrite_(model, "fourier3")
        >>> again = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> report = rewrite_like_(again, model.state_dict())
        >>> again.load_state_dict(model.state_dict())
        <All keys matched successfully>
    """
    checked_model(model)
    wanted = read_source(source)
    held = {plain_name(name): module for name, module in _expansions(model).items()}
    names = _aligned(list(wanted.sites), [*held, *_names(list_occurrences(model))])
    present = {name: site for name, site in wanted.sites.items() if names.get(name, name) in held}
    for name, site in present.items():
        check_same(names[name], held[names[name]], site)
    missing = {name: site for name, site in wanted.sites.items() if name not in present}
    notes: tuple[str, ...] = ()
    if missing:
        report, notes = _rewrite(model, missing, wanted, names, example_inputs)
    else:
        occurrences = list_occurrences(model)
        report = RewriteReport(tuple(one.site for one in occurrences), len(held), model)
    made = {plain_name(name): module for name, module in _expansions(model).items()}
    for name, site in missing.items():
        if site.form is None:
            made[names[name]].config = site.expansion
    if wanted.tensors is not None:
        try:
            for name in wanted.sites:
                _load(names[name], made[names[name]], wanted.values_of(name))
        except OrthoFxError:
            new = {id(made[names[name]]) for name in missing}
            revert_expansions(model, lambda expansion: id(expansion) in new)
            raise
    new_ones = list({id(made[names[name]]): made[names[name]] for name in missing}.values())
    tell(model, new_ones)
    watch_optimizers(model, new_ones)
    for note in adapters_that_miss(model, new_ones):
        warnings.warn(f"ortho_fx: {note}", stacklevel=2)
        notes += (note,)
    return replace(report, notes=(*report.notes, *notes))


def _expansions(model: nn.Module) -> dict[str, Expansion]:
    return {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Expansion)
    }


def _names(occurrences: Sequence[Occurrence]) -> list[str]:
    return [plain_name(name) for one in occurrences for name in (one.site.name, *one.site.aliases)]


def _aligned(wanted: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The model's name for each name of the source, which may lack a prefix or have one more."""
    known = set(names)
    if not all(name in known for name in wanted):
        prefixes = {name.split(".")[0] for name in wanted}
        shorter = {name: name.partition(".")[2] for name in wanted}
        if len(prefixes) == 1 and all(name in known for name in shorter.values()):
            return shorter
        for prefix in dict.fromkeys(name.split(".")[0] for name in names):
            if all(f"{prefix}.{name}" in known for name in wanted):
                return {name: f"{prefix}.{name}" for name in wanted}
    return {name: name for name in wanted}


def check_same(name: str, expansion: Expansion, site: SiteConfig) -> None:
    """Refuses an expansion of a model that is another one than its source describes."""
    own = expansion.site_config()
    if (own.form, own.sizes) != (site.form, site.sizes) or not _computes_like(own.expansion, site.expansion):
        told = f"frozen {own.expansion}" if own.form else str(own.expansion)
        asked = f"frozen {site.expansion}" if site.form else str(site.expansion)
        raise OrthoFxError(f"{name} holds {told} already, and the source has {asked}: call revert_ first")


def _computes_like(own: ExpansionConfig, other: ExpansionConfig) -> bool:
    # Where the source is names and shapes, neither the init nor the numbers of a clamp are known.
    fields = ("basis", "degree", "tied")
    return all(getattr(own, name) == getattr(other, name) for name in fields) and (
        (own.clamp is None) == (other.clamp is None)
    )


def _rewrite(
    model: nn.Module,
    missing: Mapping[str, SiteConfig],
    wanted: Source,
    names: Mapping[str, str],
    example_inputs: Batch | None,
) -> tuple[RewriteReport, tuple[str, ...]]:
    sharing = _sharing(model, missing, wanted, names)
    granular = [name for name in missing if name in wanted.granular]
    if granular and example_inputs is None:
        raise OrthoFxError(
            f"{', '.join(granular)}: the tensors do not tell the number and the dimension of the channels: pass "
            "example_inputs=, or the map of expansion_config(model)"
        )
    starts = {name: _start(site, wanted, example_inputs) for name, site in missing.items()}
    uncalibrated = [
        name for name, start in starts.items() if missing[name].expansion.init == "calibrated" and start == "stable"
    ]
    occurrences = list_occurrences(model, sharing=sharing)
    actual = {plain_name(name): name for one in occurrences for name in (one.site.name, *one.site.aliases)}
    configs = {actual[names[name]]: replace(site.expansion, init=starts[name]) for name, site in missing.items()}
    for name in granular:
        configs[actual[names[name]]] = _with_groups(configs[actual[names[name]]], wanted.values_of(name))
    record = pipeline.run(
        model,
        configs,
        targets=list(BY_NAME),
        sharing=sharing,
        example_inputs=example_inputs,
        disable=("lower",),
        known={actual[names[name]]: site for name, site in missing.items() if site.channels and name not in granular},
    )
    left = {site.name: site.reason for site in record.sites if site.name in configs and site.reason}
    if left:
        new = {id(one.expansion) for one in record.occurrences}
        revert_expansions(model, lambda expansion: id(expansion) in new)
        raise OrthoFxError("; ".join(f"{name} cannot be replaced: {reason}" for name, reason in left.items()))
    _freeze(model, {actual[names[name]]: site for name, site in missing.items() if site.form is not None})
    notes = record.advice
    clamped = [names[name] for name, site in missing.items() if site.expansion.clamp and not wanted.tells_shared]
    if clamped:
        notes += (
            f"the tensors tell the bounds of {', '.join(clamped)}, but not the clamp in deviations of the inputs: its "
            "config has half their distance",
        )
    equal = [] if wanted.tells_shared else _equal_apart(model, names, missing, wanted)
    if equal:
        notes += (
            f"the tensors at {', '.join(equal)} are equal, and do not tell whether the source has one expansion there: "
            "here each has its own. expansion_config(model) tells it",
        )
    if uncalibrated and wanted.tensors is None:
        notes += (
            f"{len(uncalibrated)} expansions with init 'calibrated' start 'stable', for the state dict to fill: "
            "without one, pass example_inputs or call calibrate_",
        )
    gone = {init for site in missing.values() if _is_elsewhere(init := site.expansion.init)}
    if gone and wanted.tensors is None:
        notes += (
            f"expansions with init {', '.join(sorted(gone))} start 'stable', for the state dict to fill: there is no "
            "such file here",
        )
    return RewriteReport(record.sites, record.earlier, model), notes


def _equal_apart(
    model: nn.Module, names: Mapping[str, str], missing: Mapping[str, SiteConfig], wanted: Source
) -> list[str]:
    """The sites whose expansions are not one here, and whose tensors are equal in the source."""
    made = {plain_name(name): module for name, module in _expansions(model).items()}
    found: dict[Hashable, list[str]] = {}
    for name, site in missing.items():
        values = wanted.values_of(name)
        if not any(value.is_meta or is_sharded(value) for value in values.values()):
            numbers = [(key, *value.flatten().tolist()) for key, value in sorted(values.items())]
            found.setdefault((site, *numbers), []).append(names[name])
    return [name for group in found.values() if len({id(made[name]) for name in group}) > 1 for name in group]


def _start(site: SiteConfig, wanted: Source, example_inputs: Batch | None) -> str:
    """The init of a new expansion whose values may come from elsewhere."""
    if wanted.tensors is not None or site.form is not None:
        return "stable"
    init = site.expansion.init
    calibrated = init == "calibrated" and example_inputs is None
    return "stable" if calibrated or _is_elsewhere(init) else init


def _is_elsewhere(init: str) -> bool:
    """Whether an init is a preset of a file that is not on this machine."""
    name = init.removeprefix(PRESET)
    return name != init and name not in presets() and not Path(name).exists()


def _with_groups(config: ExpansionConfig, values: Mapping[str, Tensor]) -> ExpansionConfig:
    groups = next(value.shape[1] for key, value in values.items() if key != "bounds")
    return replace(config, granularity=f"group:{groups}")


def _sharing(model: nn.Module, missing: Mapping[str, SiteConfig], wanted: Source, names: Mapping[str, str]) -> str:
    """The sharing by which the sites of this model are those of the source.

    Raises:
        OrthoFxError: none is, or a site cannot be replaced here.
    """
    problems = []
    for sharing in SHARINGS:
        occurrences = list_occurrences(model, sharing=sharing)
        known = {name: one for one in occurrences for name in _names([one])}
        absent = [names[name] for name in missing if names[name] not in known]
        if absent:
            problems.append(f"the model has no activation at {', '.join(absent)}")
            continue
        group = {name: group_of(known[names[name]], site.expansion) for name, site in missing.items()}
        together: dict[Hashable, list[str]] = {}
        for name, key in group.items():
            together.setdefault(key, []).append(name)
        parts = [group for group in together.values() if not wanted.may_share(group)]
        apart = [
            (name, first)
            for name, first in wanted.shared.items()
            if name in missing and group[name] != group.get(first)
        ]
        found = {id(known[names[name]]) for name in missing}
        left = [name for one in occurrences if id(one) in found for name in _names([one])]
        extra = sorted(set(left) - {names[name] for name in missing})
        if not (parts or apart or extra):
            reasons = {name: known[name].site.reason for name in map(names.__getitem__, missing)}
            told = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
            if told:
                raise OrthoFxError(f"sites of the source that cannot be replaced here: {'; '.join(told)}")
            return sharing
        for part in parts:
            problems.append(f"the model has one activation at {', '.join(part)}, and the source an expansion each")
        for name, first in apart:
            problems.append(f"the model has two activations at {first} and {name}, and the source one expansion")
        if extra:
            problems.append(f"the activation of the source stands at {', '.join(extra)} as well")
    sites = ", ".join(sorted(_names(list_occurrences(model)))) or "none"
    raise OrthoFxError(f"{problems[0]}; the model's sites are {sites}")


def _freeze(model: nn.Module, sites: Mapping[str, SiteConfig]) -> None:
    frozen = {}
    for name, site in sites.items():
        expansion = model.get_submodule(name)
        assert isinstance(expansion, ExpansionActivation)
        frozen[expansion] = FrozenExpansion.like(expansion, site)
    for owner in list(model.modules()):
        for key, child in owner._modules.items():
            if isinstance(child, ExpansionActivation) and child in frozen:
                owner._modules[key] = frozen[child]


def _load(name: str, expansion: Expansion, values: Mapping[str, Tensor]) -> None:
    tensors = [*expansion.parameters(), *expansion.buffers()]
    if any(tensor.is_meta or is_sharded(tensor) for tensor in tensors):
        return  # no values to copy to yet, or not in one process
    try:
        expansion.load_state_dict({key: whole(value) for key, value in values.items()})
    except RuntimeError as error:
        told = " ".join(str(error).split("\n\t")[1:]) or str(error)
        raise OrthoFxError(f"{name}: the source's tensors do not fit: {told}") from None
