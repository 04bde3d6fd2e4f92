"""initialise: sets the initial values of the new expansions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.passes.context import Context
from ortho_fx.passes.modules.exchange import set_nested_paths
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.revert import put_in_copy
from ortho_fx.passes.search import find_occurrences
from ortho_fx.passes.vocabulary.expansions import LearnableExpansion


def initialise(model: nn.Module, context: Context) -> int:
    """Gives each new expansion the start that its config asks for; returns how many.

    Without this pass all expansions keep the "stable" start.

    Raises:
        OrthoFxError: a fit or a calibration is impossible, for example because inputs are constant or not finite.
    """
    pending = [one for one in context.occurrences if one.expansion is not None and not one.started]
    groups: dict[LearnableExpansion, list[Occurrence]] = {}
    for one in pending:
        assert one.expansion is not None
        groups.setdefault(one.expansion, []).append(one)
    for group in groups.values():
        _start(group)
    if any(one.config is not None and one.config.init == "calibrated" for one in pending):
        _calibrate(context)
    return len(pending)


def _start(group: Sequence[Occurrence]) -> None:
    """Starts the expansion of these sites."""
    expansion, config = group[0].expansion, group[0].config
    assert expansion is not None
    assert config is not None
    for one in group:
        one.started = True
    if expansion.config != config:
        expansion.config = config
    if config.init in ("stable", "calibrated"):  # made "stable"; `_calibrate` follows
        return
    seen = Histogram.merged([one.seen.inputs for one in group if one.seen is not None])
    try:
        values, fit = expansion.initial_values(seen if config.init == "fit" and seen.samples else None)
    except OrthoFxError as error:
        raise OrthoFxError(f"{group[0].site.name}: {error}") from None
    expansion.set_parameters(values)
    if fit is not None:
        for one in group:
            one.describe(fit_rmse=fit.rmse)


def _calibrate(context: Context) -> None:
    """Calibrates the expansions with init "calibrated" in a copy of the model that holds all new expansions."""
    trial = context.unchanged
    assert trial is not None
    assert context.example_inputs is not None
    pending: dict[LearnableExpansion, str] = {}
    twins = find_occurrences(trial, context.table, sharing=context.sharing)
    for twin, one in zip(twins, context.occurrences, strict=True):
        if one.expansion is not None:
            # The model's own expansions, not copies: calibration must set their parameters.
            put_in_copy(twin.substitute, one.expansion)
            if one.config is not None and one.config.init == "calibrated":
                pending.setdefault(one.expansion, one.site.name)
    set_nested_paths(trial)
    named = {name: expansion for expansion, name in pending.items()}
    context.maker.calibrate(trial, named, [context.example_inputs], context.process_group)
    context.unchanged = None
