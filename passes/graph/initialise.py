"""initialise: sets the initial values of the new expansions."""

from __future__ import annotations

from torch import nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.context import Context
from ortho_fx.passes.modules.exchange import set_nested_paths
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.revert import put_in_copy
from ortho_fx.passes.search import find_occurrences


def initialise(model: nn.Module, context: Context) -> int:
    """Gives each new expansion the start that its config asks for; returns how many.

    Without this pass all expansions keep the "stable" start.

    Raises:
        OrthoFxError: a fit or a calibration is impossible, for example because inputs are constant or not finite.
    """
    pending = [one for one in context.occurrences if one.expansion is not None and not one.started]
    for one in pending:
        _start(one)
    if any(one.config is not None and one.config.init == "calibrated" for one in pending):
        _calibrate(context)
    return len(pending)


def _start(one: Occurrence) -> None:
    expansion, config = one.expansion, one.config
    assert expansion is not None
    assert config is not None
    one.started = True
    if expansion.config != config:
        expansion.config = config
    if config.init in ("stable", "calibrated"):  # made "stable"; `_calibrate` follows
        return
    seen = None
    if config.init == "fit" and one.seen is not None and one.seen.inputs.samples:
        seen = one.seen.inputs
    try:
        values, fit = expansion.initial_values(seen)
    except OrthoFxError as error:
        raise OrthoFxError(f"{one.site.name}: {error}") from None
    expansion.set_parameters(values)
    if fit is not None:
        one.describe(fit_rmse=fit.rmse)


def _calibrate(context: Context) -> None:
    """Calibrates the expansions with init "calibrated" in a copy of the model that holds all new expansions."""
    trial = context.unchanged
    assert trial is not None
    assert context.example_inputs is not None
    pending = {}
    twins = find_occurrences(trial, context.table, sharing=context.sharing)
    for twin, one in zip(twins, context.occurrences, strict=True):
        if one.expansion is not None:
            # The model's own expansions, not copies: calibration must set their parameters.
            put_in_copy(twin.substitute, one.expansion)
            if one.config is not None and one.config.init == "calibrated":
                pending[one.site.name] = one.expansion
    set_nested_paths(trial)
    context.maker.calibrate(trial, pending, [context.example_inputs], context.process_group)
    context.unchanged = None
