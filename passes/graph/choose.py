"""choose: decides which sites are replaced and by which expansion, and gives every other site a reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.passes.context import ConfigMap, Context
from ortho_fx.passes.observe import copied, observe
from ortho_fx.passes.occurrence import Observation, Occurrence, merged_observation
from ortho_fx.passes.search import reason_not_chosen
from ortho_fx.passes.vocabulary.sites import Site
from ortho_fx.processes import measured


def choose(model: nn.Module, context: Context) -> int:
    """Gives each site its config, or the reason why it is left; returns the number of changed notes.

    Raises:
        OrthoFxError: nothing to replace, a pattern that matches no site, patterns that disagree on a shared site, a
            config that needs example_inputs, or example_inputs on which the model fails.
    """
    pending = [one for one in context.occurrences if not one.decided]
    if context.occurrences and not pending:
        return 0
    for one in pending:
        reason = one.site.reason or reason_not_chosen(one, context.table)
        if reason != one.site.reason:
            one.describe(reason=reason)
    configs = _configs([one.site for one in context.occurrences], context.config, strict=not context.earlier)
    chosen = {id(one): config for one, config in zip(context.occurrences, configs, strict=True)}
    for one in pending:
        site = context.known.get(one.site.name)
        if site is not None:
            one.seen = Observation(Histogram(), site.channels, site.channel_dim, problem="")
    wanted = [chosen[id(one)] for one in pending if not one.site.reason and one.seen is None]
    if context.example_inputs is None:
        for config in wanted:
            check_needs_no_example(config)
    elif any(config is not None and _looks_at_inputs(config) for config in wanted):
        for one, seen in zip(context.occurrences, _observed(model, context), strict=True):
            one.seen = seen
    told = {config: str(config) for config in chosen.values()}
    for one in pending:
        config = chosen[id(one)]
        reason = one.site.reason or _obstacle(config, one)
        one.describe(reason=reason, expansion=None if reason else told[config])
        one.config, one.decided = None if reason else config, True
    decided = [one.config for one in context.occurrences if one.config is not None]
    if context.replaces and not decided and not context.earlier:
        raise OrthoFxError(_nothing_to_replace(model, [one.site for one in context.occurrences]))
    if context.example_inputs is not None and any(config.init == "calibrated" for config in decided):
        context.unchanged = copied(model)
    return sum(one.note() for one in pending)


def _observed(model: nn.Module, context: Context) -> list[Observation]:
    """What reaches each site in this process and the others."""
    names, inputs = [one.site.name for one in context.occurrences], context.example_inputs
    assert inputs is not None

    def own() -> dict[str, Observation]:
        seen = observe(model, context.table, inputs, sharing=context.sharing)
        return dict(zip(names, seen, strict=True))

    seen_by_each = measured(own, context.process_group)
    return [merged_observation([each[name] for each in seen_by_each]) for name in names]


def check_needs_no_example(config: ExpansionConfig | None) -> None:
    """Raises an `OrthoFxError` if the config needs a run of the model."""
    if config is None:
        return
    needs = {"granularity": config.by_channel, "init": config.init == "calibrated"}
    for setting, it_does in needs.items():
        if it_does:
            value = getattr(config, setting)
            raise OrthoFxError(
                f"{setting} {value!r} needs a batch to run: call rewrite_(model, config, example_inputs=...)"
            )


def _looks_at_inputs(config: ExpansionConfig) -> bool:
    return config.by_channel or config.init == "fit"


def _obstacle(config: ExpansionConfig | None, one: Occurrence) -> str:
    """Why a site that could be replaced is left; empty if it is replaced."""
    if config is None:
        return "excluded by its name"
    if config.init in ("fit", "exact") and one.reference is None:
        return f"its arguments are known only when it runs, and init {config.init!r} needs them before"
    if one.backward is not None:
        plain = {"granularity": config.granularity == "layer", "clamp": config.clamp is None}
        settings = [name for name, is_plain in plain.items() if not is_plain]
        if config.init == "calibrated":
            settings.append("init 'calibrated'")
        if settings:
            return f"{' and '.join(settings)} cannot be had in a graph that holds its backward"
    if config.by_channel and one.seen is not None:
        if one.seen.problem:
            return one.seen.problem
        try:
            config.groups(one.seen.channels)
        except OrthoFxError as error:
            return str(error)
    return ""


def _configs(
    sites: Sequence[Site], config: ExpansionConfig | ConfigMap | None, *, strict: bool
) -> list[ExpansionConfig | None]:
    if config is None or isinstance(config, ExpansionConfig):
        return [config or ExpansionConfig()] * len(sites)
    if not isinstance(config, Mapping):
        raise OrthoFxError(f"config must be an ExpansionConfig or a map of names to them; got {type(config).__name__}")
    names = [name for site in sites for name in (site.name, *site.aliases)]
    for pattern, value in config.items():
        if not isinstance(pattern, str):
            raise OrthoFxError(f"config must map names of sites, or patterns of them; got {pattern!r}")
        if value is not None and not isinstance(value, ExpansionConfig):
            raise OrthoFxError(f"the config of {pattern!r} must be an ExpansionConfig or None; got {value!r}")
        if strict and not any(_matches(pattern, name) for name in names):
            raise OrthoFxError(f"pattern {pattern!r} matches no site; sites are {', '.join(names) or 'none'}")
    return [_config_of(site, config) for site in sites]


def _config_of(site: Site, config: ConfigMap) -> ExpansionConfig | None:
    """The config of the first pattern that matches a site; all names of a shared site must get the same config."""
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


def _nothing_to_replace(model: nn.Module, sites: Sequence[Site]) -> str:
    if not sites:
        return f"{type(model).__name__} has no activation to replace"
    reasons = "; ".join(f"{site.name or 'the model'}: {site.reason}" for site in sites)
    return f"no activation of {type(model).__name__} can be replaced: {reasons}"
