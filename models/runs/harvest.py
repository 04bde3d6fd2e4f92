"""Harvests what runs have learned: the mean of their expansions, as a preset from which others start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ortho_fx.bases import basis_named
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.models.runs.files import read_run
from ortho_fx.models.weights.expansions import SavedExpansion
from ortho_fx.numerics.fit import fit_expansion
from ortho_fx.numerics.preset import Preset


def harvest(runs: Sequence[str | Path], error: float | None = None) -> Preset:
    """The mean of the functions that runs have learned, over their layers, groups and seeds.

    Each function is taken in standard units, h(z) = f(mean + std z) / std with the mean and deviation of its site's
    inputs at the last measurement (without the last division for a gate). The expansion closest to the mean of all h,
    weighted for z of N(0, 1), is the preset.

    Args:
        runs: directories of runs with expansions of one basis and degree.
        error: prunes terms: the preset has the lowest degree whose root mean square distance from the mean is at most
            this, in standard units. Without it, the degree is that of the runs.

    Raises:
        OrthoFxError: no run, a run without expansions or measured inputs, runs whose expansions differ in their
            settings, an error that is not above zero, or one that no degree up to that of the runs meets.
    """
    if not runs:
        raise OrthoFxError("harvest needs at least one run")
    if error is not None and not error > 0:
        raise OrthoFxError(f"error must be above zero; got {error}")
    functions, config = [], None
    for directory in runs:
        learned = read_run(directory).now
        if learned is None or not learned.sites:
            raise OrthoFxError(f"{directory} holds no expansions that were measured: there is nothing to harvest")
        for site, saved in learned.sites.items():
            its = replace(saved.activation.config, init="stable", granularity="layer", clamp=None)
            if config is not None and its != config:
                raise OrthoFxError(f"{directory} has a {its} expansion at {site}, and those before are {config}")
            config = its
            functions.append(_standard(saved, f"{directory}: {site}"))
    assert config is not None

    def mean(z: Tensor) -> Tensor:
        return torch.stack([function(z) for function in functions]).mean(0)

    assert config.degree is not None
    lowest = config.degree if error is None else basis_named(config.basis).degrees[0]
    for degree in range(lowest, config.degree + 1):
        pruned = replace(config, degree=degree)
        fitted = fit_expansion(mean, pruned)
        preset = Preset(pruned, fitted.parameters, fitted.rmse, len(functions))
        if error is None or fitted.rmse <= error:
            return preset
    raise OrthoFxError(
        f"no {config.basis} expansion up to degree {config.degree} is within {error:g} of the mean of "
        f"{len(functions)} functions; the closest is off by {preset.rmse:.2g}: allow an error of that size"
    )


def _standard(saved: SavedExpansion, called: str) -> Callable[[Tensor], Tensor]:
    """h(z), the mean over the groups of a site."""
    if saved.inputs is None:
        raise OrthoFxError(f"{called}: its inputs were never measured")
    activation, basis = saved.activation, saved.activation.basis
    config: ExpansionConfig = activation.config
    mean, std = saved.inputs.mean, saved.inputs.std
    held = [getattr(activation, p.name).detach().double() for p in basis.parameters]
    bounds = activation.bounds

    def standard(z: Tensor) -> Tensor:
        x = (mean + std * z).unsqueeze(-1)
        if bounds is not None:
            x = x.clamp(*bounds.tolist())
        columns = [values.reshape(len(values), -1) for values in held]
        prepared = basis.prepare(torch.float64, *columns)[: len(columns)]
        y = (basis.evaluate(x, *prepared) + torch.zeros_like(x)).mean(-1)
        return y if config.gated else y / std

    return standard
