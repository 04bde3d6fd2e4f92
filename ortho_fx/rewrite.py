"""`rewrite_` and `find_sites`: from any model to the same model with learnable activations, and what was done to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from ortho_fx.activations import ExpansionActivation, make_activation
from ortho_fx.batches import Batch
from ortho_fx.calibration import calibrate_expansions
from ortho_fx.check import Check, check_model
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.freeze import OURS
from ortho_fx.passes.find import Occurrence, find_occurrences
from ortho_fx.passes.observe import Observation, copied, observe
from ortho_fx.passes.sites import Site, format_sites
from ortho_fx.passes.substitute import revert_expansions
from ortho_fx.passes.targets import TargetTable, choose_targets

ConfigMap = Mapping[str, ExpansionConfig | None]


@dataclass(frozen=True)
class RewriteReport:
    """What `rewrite_` did: every site with its fate; `print(report)` is a table.

    Attributes:
        sites: the sites in the order of the model's modules, those that were left with the reason.
        earlier: how many expansions the model held before.
        model: the model.
    """

    sites: tuple[Site, ...]
    earlier: int = 0
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def replaced(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.reason)

    @property
    def left(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.reason)

    def check(self, inputs: Batch) -> Check:
        """Runs copies of the model with these inputs in train and in eval mode, and names what is not as it should be:
        expansions that are never called, or in one mode only, and in-place activations whose input is read again.

        Raises:
            OrthoFxError: a model that holds no expansion any more, or that cannot be copied.
        """
        assert self.model is not None
        return check_model(self.model, inputs)

    def to_json(self) -> str:
        """The sites as a JSON list, each with the fields of `Site`."""
        return json.dumps([asdict(site) for site in self.sites], indent=1)

    def __str__(self) -> str:
        parameters = sum(site.parameters for site in self.replaced)
        summary = f"{len(self.replaced)} replaced, {len(self.left)} left, {parameters} new parameters"
        if self.earlier:
            summary += f"; the model already held {self.earlier} expansions"
        return f"{format_sites(self.sites)}\n{summary}" if self.sites else summary


def find_sites(
    model: nn.Module,
    example_inputs: Batch | None = None,
    *,
    targets: Iterable[str] | None = None,
    sharing: str = "instance",
) -> list[Site]:
    """The activations that `rewrite_` would replace, and those that it would not, with the reason; changes nothing.

    Args:
        model: any module.
        example_inputs: what to run a copy of the model with; sites that it does not reach are then listed with that.
        targets: activation functions by name ("relu", "gelu", "sigmoid" ...); by default every one that is not a gate.
        sharing: as in `rewrite_`.

    Raises:
        OrthoFxError: a target or a sharing that is not known, or a scripted model.
    """
    table, share = choose_targets(targets), _shares(sharing)
    sites = [occurrence.site for occurrence in find_occurrences(_checked(model), table, share=share)]
    if example_inputs is None:
        return sites
    observations = observe(model, table, example_inputs, share=share)
    unreached = "example_inputs do not reach it"
    return [
        site if site.reason or seen.inputs.samples else replace(site, reason=unreached)
        for site, seen in zip(sites, observations, strict=True)
    ]


def rewrite_(
    model: nn.Module,
    config: ExpansionConfig | ConfigMap | None = None,
    *,
    targets: Iterable[str] | None = None,
    sharing: str = "instance",
    example_inputs: Batch | None = None,
) -> RewriteReport:
    """Replaces the activations of a model by learnable expansions, in place.

    Activation modules are swapped, those of libraries as well as PyTorch's: a leaf module without parameters is known
    by what it computes. A module that calls an activation in its own methods, or spells its formula out there, gets a
    subclass of its class whose methods call an expansion in its place. Parameters take the device and the dtype of
    their neighbours. Rewrite before the optimizer, DDP or FSDP see the model. A second call finds nothing more to do.

    Args:
        model: any module; a `torch.fx.GraphModule`, such as an exported program's, is rewritten in its graph.
        config: one config for every site (`ExpansionConfig()` when omitted), or a map from patterns of site names to
            configs, of which the first that matches counts: an exact name, a glob ("blocks.*.act") or "re:" with a
            regular expression for the whole name. None as a config leaves the sites alone, as does no match.
        targets: activation functions by name; by default every one that is not a gate.
        sharing: "instance" (a module that stands in several places, or is called several times, is one expansion) or
            "site" (each place and each call in its owner's source has its own).
        example_inputs: a tensor, a tuple of positional arguments or a map of keyword arguments; a copy of the model is
            run with it. Needed for init="calibrated" and for expansions a channel or group, which take the
            dimension of their channels from the layers before; with it, init="fit" weighs by the inputs that each
            activation really gets (by N(mean, std^2) of them where they are few), where it otherwise takes N(0, 1).

    Raises:
        OrthoFxError: a model with nothing to replace, a scripted model, a device that is gone, a pattern that matches
            no site, patterns that disagree on a shared site, a target that is not known, a config that needs
            example_inputs, or inputs that are constant or not finite. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> print(rewrite_(model, ExpansionConfig(basis="hermite", degree=3)))
        name  kind    function  expansion  parameters
        1     module  gelu      hermite 3  4
        1 replaced, 0 left, 4 new parameters
    """
    table, share = choose_targets(targets), _shares(sharing)
    occurrences = find_occurrences(_checked(model), table, share=share)
    earlier = sum(isinstance(module, OURS) for module in model.modules())
    configs = _configs([occurrence.site for occurrence in occurrences], config, strict=not earlier)
    wanted = [chosen for occurrence, chosen in zip(occurrences, configs, strict=True) if not occurrence.site.reason]
    if example_inputs is None:
        for chosen in wanted:
            check_needs_no_example(chosen)
        observations: list[Observation | None] = [None] * len(occurrences)
    elif any(chosen is not None and _looks_at_inputs(chosen) for chosen in wanted):
        observations = [*observe(model, table, example_inputs, share=share)]
    else:
        observations = [None] * len(occurrences)

    expansions: list[ExpansionActivation | None] = []
    sites = []
    for occurrence, chosen, seen in zip(occurrences, configs, observations, strict=True):
        site = occurrence.site
        if not site.reason:
            site = replace(site, reason=_obstacle(chosen, occurrence, seen))
        expansion = None
        if not site.reason and chosen is not None:
            expansion, fit_rmse = _make(model, occurrence, chosen, seen)
            parameters = sum(parameter.numel() for parameter in expansion.parameters())
            site = replace(site, expansion=str(chosen), parameters=parameters, fit_rmse=fit_rmse)
        expansions.append(expansion)
        sites.append(site)
    if not any(expansions) and not earlier:
        raise OrthoFxError(_nothing_to_replace(model, sites))
    if example_inputs is not None:
        _calibrate(model, table, share, expansions, example_inputs)
    _substitute(model, occurrences, expansions)
    return RewriteReport(tuple(sites), earlier, model)


def _substitute(
    model: nn.Module, occurrences: Sequence[Occurrence], expansions: Sequence[ExpansionActivation | None]
) -> None:
    """Puts every expansion in its place, or none of them."""
    chosen = {id(expansion) for expansion in expansions if expansion is not None}
    try:
        for occurrence, expansion in zip(occurrences, expansions, strict=True):
            if expansion is not None:
                occurrence.substitute(expansion)
    except BaseException:
        revert_expansions(model, lambda expansion: id(expansion) in chosen)
        raise


def revert_(model: nn.Module) -> tuple[str, ...]:
    """Puts back every activation that `rewrite_` replaced: the model as it was, with what it has learned elsewhere.

    Returns:
        The names of the expansions, frozen ones as well, that are gone; those that were built into the model stay.

    Raises:
        OrthoFxError: a model in which no activation was replaced.
    """
    names = revert_expansions(_checked(model), lambda expansion: True)
    if not names:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion that rewrite_ put there")
    return names


def _shares(sharing: str) -> bool:
    if sharing not in ("instance", "site"):
        raise OrthoFxError(f"sharing must be instance or site; got {sharing!r}")
    return sharing == "instance"


def check_needs_no_example(config: ExpansionConfig | None) -> None:
    """Raises an `OrthoFxError` where a config can be met only by running the model."""
    if config is None:
        return
    for setting, value in (("granularity", config.granularity), ("init", config.init)):
        if value not in ("layer", "stable", "paper", "fit"):
            raise OrthoFxError(
                f"{setting} {value!r} needs a batch to run: call rewrite_(model, config, example_inputs=...)"
            )


def _looks_at_inputs(config: ExpansionConfig) -> bool:
    return config.granularity != "layer" or config.init == "fit"


def _obstacle(config: ExpansionConfig | None, occurrence: Occurrence, seen: Observation | None) -> str:
    """Why a site that could be replaced is not; empty where it is."""
    if config is None:
        return "excluded by its name"
    if config.init == "fit" and occurrence.reference is None:
        return "its arguments are known only when it runs, and init 'fit' needs them before"
    if config.granularity != "layer" and seen is not None:
        if seen.problem:
            return seen.problem
        try:
            config.groups(seen.channels)
        except OrthoFxError as error:
            return str(error)
    return ""


def _make(
    model: nn.Module, occurrence: Occurrence, config: ExpansionConfig, seen: Observation | None
) -> tuple[ExpansionActivation, float | None]:
    """The expansion for a site, and the error of the fit that it starts from."""
    device, dtype = _placement(model, occurrence.site.name)
    try:
        expansion = make_activation(
            config,
            channels=seen and seen.channels,
            channel_dim=seen and seen.channel_dim,
            reference=occurrence.reference,
            device=device,
            dtype=dtype,
        )
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that a device is there
        raise OrthoFxError(f"{occurrence.site.name} cannot be placed on {device}: {error}") from None
    fit = None
    if config.init == "fit":  # "stable" is made for N(0, 1), and "calibrated" is set afterwards
        try:
            values, fit = expansion.initial_values(seen.inputs if seen is not None and seen.inputs.samples else None)
        except OrthoFxError as error:
            raise OrthoFxError(f"{occurrence.site.name}: {error}") from None
        expansion.set_parameters(values)
    return expansion.train(occurrence.owner.training), fit.rmse if fit else None


def _calibrate(
    model: nn.Module, table: TargetTable, share: bool, expansions: Sequence[ExpansionActivation | None], batch: Batch
) -> None:
    """Starts the expansions with init "calibrated" for what they get in a copy of the model that has them all."""
    if not any(expansion is not None and expansion.config.init == "calibrated" for expansion in expansions):
        return
    trial = copied(model)
    pending: dict[str, ExpansionActivation] = {}
    for occurrence, expansion in zip(find_occurrences(trial, table, share=share), expansions, strict=True):
        if expansion is not None:
            # The expansions themselves, not copies: those to calibrate are set in the course of it.
            occurrence.substitute(expansion)
            if expansion.config.init == "calibrated":
                pending[occurrence.site.name] = expansion
    calibrate_expansions(trial, pending, [batch])


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise OrthoFxError(f"the model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise OrthoFxError(f"{model.original_name} is scripted: rewrite the module that it was scripted from")
    return model


def _configs(
    sites: Sequence[Site], config: ExpansionConfig | ConfigMap | None, *, strict: bool
) -> list[ExpansionConfig | None]:
    if config is None or isinstance(config, ExpansionConfig):
        return [config or ExpansionConfig()] * len(sites)
    if not isinstance(config, Mapping):
        raise OrthoFxError(f"config must be an ExpansionConfig or a map of names to them; got {type(config).__name__}")
    names = [name for site in sites for name in (site.name, *site.aliases)]
    for pattern, value in config.items():
        if value is not None and not isinstance(value, ExpansionConfig):
            raise OrthoFxError(f"the config of {pattern!r} must be an ExpansionConfig or None; got {value!r}")
        if strict and not any(_matches(pattern, name) for name in names):
            raise OrthoFxError(f"pattern {pattern!r} matches no site; sites are {', '.join(names) or 'none'}")
    return [_config_of(site, config) for site in sites]


def _config_of(site: Site, config: ConfigMap) -> ExpansionConfig | None:
    """The config of the first pattern that matches a site; all names of a shared one have to agree."""
    first: dict[str, str] = {}
    for name in (site.name, *site.aliases):
        pattern = next((pattern for pattern in config if _matches(pattern, name)), None)
        if pattern is not None:
            first[name] = pattern
    chosen = {name: config[pattern] for name, pattern in first.items()}
    if len(set(chosen.values())) > 1:
        told = ", ".join(f"{name} by {pattern!r}" for name, pattern in first.items())
        raise OrthoFxError(f"patterns disagree on one shared activation: {told}; share by site, or let them agree")
    return next(iter(chosen.values()), None)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise OrthoFxError(f"pattern {pattern!r} is no regular expression: {error}") from None
    return pattern == name or fnmatchcase(name, pattern)


def _placement(model: nn.Module, name: str) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and floating dtype of the nearest parameters: those of the owner, else of its closest ancestor."""
    path = name.split(".")[:-1]
    for length in range(len(path), -1, -1):
        owner = model.get_submodule(".".join(path[:length]))
        for parameter in owner.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return None, None


def _nothing_to_replace(model: nn.Module, sites: Sequence[Site]) -> str:
    if not sites:
        return f"{type(model).__name__} has no activation to replace"
    reasons = "; ".join(f"{site.name or 'the model'}: {site.reason}" for site in sites)
    return f"no activation of {type(model).__name__} can be replaced: {reasons}"
