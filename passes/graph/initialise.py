"""initialise: the values that the new expansions start from."""

from __future__ import annotations

from torch import nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.context import Context, Entry
from ortho_fx.passes.find import find_occurrences
from ortho_fx.passes.substitute import put_in_copy


def initialise(model: nn.Module, context: Context) -> int:
    """Gives each new expansion the start that its config asks for; how many. Without this pass they stay "stable".

    Raises:
        OrthoFxError: a fit or a calibration that cannot be made, as of inputs that are constant or not finite.
    """
    pending = [entry for entry in context.entries if entry.expansion is not None and not entry.started]
    for entry in pending:
        _start(entry)
    if any(entry.config is not None and entry.config.init == "calibrated" for entry in pending):
        _calibrate(context)
    return len(pending)


def _start(entry: Entry) -> None:
    expansion, config = entry.expansion, entry.config
    assert expansion is not None
    assert config is not None
    expansion.config, entry.started = config, True
    if config.init in ("stable", "calibrated"):  # "stable" it is already, and "calibrated" comes with the inputs
        return
    seen = entry.seen.inputs if config.init == "fit" and entry.seen is not None and entry.seen.inputs.samples else None
    try:
        values, fit = expansion.initial_values(seen)
    except OrthoFxError as error:
        raise OrthoFxError(f"{entry.site.name}: {error}") from None
    expansion.set_parameters(values)
    if fit is not None:
        entry.describe(fit_rmse=fit.rmse)


def _calibrate(context: Context) -> None:
    """Starts the expansions with init "calibrated" for what they get in a copy of the model that has them all."""
    trial = context.unchanged
    assert trial is not None
    assert context.example_inputs is not None
    pending = {}
    occurrences = find_occurrences(trial, context.table, share=context.share)
    for occurrence, entry in zip(occurrences, context.entries, strict=True):
        if entry.expansion is not None:
            # The expansions themselves, not copies: those to calibrate are set in the course of it.
            put_in_copy(occurrence.substitute, entry.expansion)
            if entry.config is not None and entry.config.init == "calibrated":
                pending[entry.site.name] = entry.expansion
    context.calibrate(trial, pending, [context.example_inputs])
    context.unchanged = None
