"""Harvests what runs have learned: the mean of their expansions, as a preset from which others start."""

from __future__ import annotations

import math
import statistics
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
    inputs at the start of the run (without the last division for a gate). A run that starts from the preset is
    calibrated in the same units. Inputs grow while a run learns: the preset is the expansion closest to the mean of all
    h where they are at the last measurement, weighted by a Gaussian of their mean and deviation.

    Args:
        runs: directories of runs with expansions of one basis and degree.
        error: prunes terms: the preset has the lowest degree whose root mean square distance from the mean function is
            at most this share of that function's deviation. Without it, the degree is that of the runs.

    Raises:
        OrthoFxError: no run, a run without expansions or measured inputs, runs whose expansions differ in their
            settings, an error that is not above zero, or one that no degree up to that of the runs meets.
    """
    if not runs:
        raise OrthoFxError("harvest needs at least one run")
    if error is not None and not error > 0:
        raise OrthoFxError(f"error must be above zero; got {error}")
    functions: list[_Learned] = []
    for directory in runs:
        run = read_run(directory)
        if run.start is None or run.now is None or not run.now.sites:
            raise OrthoFxError(f"{directory} holds no expansions that were measured: there is nothing to harvest")
        for site, saved in run.now.sites.items():
            learned = _Learned(f"{directory}: {site}", saved, run.start.sites.get(site))
            if functions and learned.config != functions[0].config:
                raise OrthoFxError(
                    f"{directory} has a {learned.config} expansion at {site}, and those before are "
                    f"{functions[0].config}"
                )
            functions.append(learned)
    config = functions[0].config

    def mean(z: Tensor) -> Tensor:
        return torch.stack([function(z) for function in functions]).mean(0)

    middle = statistics.fmean(function.mean for function in functions)
    spread = math.sqrt(statistics.fmean(f.std**2 + (f.mean - middle) ** 2 for f in functions))
    deviation = _deviation(mean, middle, spread)
    assert config.degree is not None
    lowest = config.degree if error is None else basis_named(config.basis).degrees[0]
    for degree in range(lowest, config.degree + 1):
        pruned = replace(config, degree=degree)
        fitted = fit_expansion(mean, pruned, mean=middle, std=spread)
        preset = Preset(pruned, fitted.parameters, fitted.rmse, len(functions))
        if error is None or fitted.rmse <= error * deviation:
            return preset
    raise OrthoFxError(
        f"no {config.basis} expansion up to degree {config.degree} is within {error:g} of the mean of "
        f"{len(functions)} functions; the closest is off by {preset.rmse / deviation:.2g}: allow an error of that size"
    )


class _Learned:
    """h(z) of a site, the mean over its groups; `mean` and `std` are those of z at the last measurement.

    Raises:
        OrthoFxError: inputs that were not measured, at the start or at the end, or that were all equal.
    """

    def __init__(self, called: str, saved: SavedExpansion, start: SavedExpansion | None) -> None:
        if saved.inputs is None or start is None or start.inputs is None:
            raise OrthoFxError(f"{called}: its inputs were never measured")
        if not (start.inputs.std > 0 and saved.inputs.std > 0):
            raise OrthoFxError(f"{called}: its inputs were all equal when they were measured")
        self._activation, self._start = saved.activation, start.inputs
        self.config: ExpansionConfig = replace(saved.activation.config, init="stable", granularity="layer", clamp=None)
        self.mean = (saved.inputs.mean - start.inputs.mean) / start.inputs.std
        self.std = saved.inputs.std / start.inputs.std

    def __call__(self, z: Tensor) -> Tensor:
        activation, basis = self._activation, self._activation.basis
        x = (self._start.mean + self._start.std * z).unsqueeze(-1)
        if activation.bounds is not None:
            x = x.clamp(*activation.bounds.tolist())
        held = [getattr(activation, p.name).detach().double() for p in basis.parameters]
        columns = [values.reshape(len(values), -1) for values in held]
        prepared = basis.prepare(torch.float64, *columns)[: len(columns)]
        y = (basis.evaluate(x, *prepared) + torch.zeros_like(x)).mean(-1)
        return y if self.config.gated else y / self._start.std


def _deviation(function: Callable[[Tensor], Tensor], mean: float, std: float) -> float:
    """The standard deviation of a function of z, for z of N(mean, std^2)."""
    places = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001
    return float(function(mean + std * torch.special.ndtri(places)).std(correction=0))
