"""`calibrate_`: expansions initialised for the pre-activations that a model really has.

A stable expansion f_1 is made for inputs N(0, 1). GPT-2's weights start at a standard deviation of 0.02, which gives
its pre-activations one of about 0.2 to 0.6, and there f_1 is little more than a large constant. One pass over real
batches measures the mean mu and the standard deviation sigma at every site, and
    f(x) = sigma f_1((x - mu) / sigma)
has the gains of f_1 for inputs N(mu, sigma^2): E[f'^2] = 1, and E[f^2] = sigma^2. Each basis holds f exactly in its own
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ortho_fx.activations import ExpansionActivation
from ortho_fx.errors import OrthoFxError
from ortho_fx.initialisation import initial_parameters
from ortho_fx.moments import Array, Values


@dataclass(frozen=True)
class SiteStatistics:
    """Mean and standard deviation (of the population) of what came into one expansion, over `samples` numbers."""

    name: str
    mean: float
    std: float
    samples: int


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_` measured, printed as a table; `uncalled` are the expansions that no batch reached."""

    sites: tuple[SiteStatistics, ...]
    uncalled: tuple[str, ...]

    def __str__(self) -> str:
        width = max([len(site.name) for site in self.sites] + [4])
        lines = [f"{'name':{width}}  {'mean':>10}  {'std':>10}  samples"]
        lines += [f"{site.name:{width}}  {site.mean:10.4g}  {site.std:10.4g}  {site.samples}" for site in self.sites]
        lines += [f"{name:{width}}  not called" for name in self.uncalled]
        return "\n".join(lines)


def calibrate_(model: nn.Module, batches: Iterable[Tensor | tuple[Any, ...] | Mapping[str, Any]]) -> Calibration:
    """Runs the model over batches and initialises each expansion for the inputs that it got, in place.

    Every expansion starts again from its `config.init`: what it had learned is gone. The model runs without gradients,
    in the mode (train or eval) that it is in.

    Args:
        model: a model with expansions.
        batches: a tensor, a tuple of positional arguments or a map of keyword arguments for each call of the model.

    Raises:
        OrthoFxError: a model without expansions, no batch, or a site whose inputs are constant or not finite; the
            model is then as it was.
    """
    expansions = {name: module for name, module in model.named_modules() if isinstance(module, ExpansionActivation)}
    if not expansions:
        raise OrthoFxError(f"{type(model).__name__} holds no expansion to calibrate: call rewrite_ first")
    streams = {name: _Stream() for name in expansions}
    handles = [
        expansion.register_forward_pre_hook(lambda _, inputs, stream=streams[name]: stream.add(inputs[0]))
        for name, expansion in expansions.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not any(stream.samples for stream in streams.values()):
        raise OrthoFxError("no batch reached an expansion: batches is empty, or the model calls none of them")
    sites = [
        SiteStatistics(name, stream.mean, stream.std, stream.samples)
        for name, stream in streams.items()
        if stream.samples
    ]
    for site in sites:
        if not math.isfinite(site.std):
            raise OrthoFxError(f"the inputs of {site.name} are not finite")
        if site.std <= 1e-12 * max(abs(site.mean), 1e-30):
            raise OrthoFxError(f"the inputs of {site.name} are constant ({site.mean:g}): they have no scale to fit to")
    for site in sites:
        expansion = expansions[site.name]
        config = expansion.config
        assert config.degree is not None
        start = initial_parameters(config.basis, config.degree, config.init)
        expansion.set_parameters(rescale(config.basis, start, site.mean, site.std))
    return Calibration(tuple(sites), tuple(name for name in expansions if not streams[name].samples))


def rescale(basis: str, values: Values, mean: float, std: float) -> dict[str, Array]:
    """The parameters of std * f((x - mean) / std), for those of f: exact, since every basis is closed under it.

    Hermite polynomials change variable by their generating function exp(x t - t^2 / 2): P_n(u x + v) =
    sum_k u^k h_{n-k} P_k(x), where m h_m = v h_{m-1} + (u^2 - 1) h_{m-2} and h_0 = 1.
    """
    if basis == "hermite":
        a = np.asarray(values["coefficients"], dtype=np.float64)
        u, v = 1 / std, -mean / std
        h = np.zeros(len(a))
        h[0] = 1.0
        for m in range(1, len(a)):
            h[m] = (v * h[m - 1] + (u**2 - 1) * (h[m - 2] if m > 1 else 0.0)) / m
        return {"coefficients": np.array([std * u**k * (a[k:] @ h[: len(a) - k]) for k in range(len(a))])}
    if basis == "fourier":
        return {
            "constant": std * values["constant"],
            "coefficients": std * values["coefficients"],
            "frequencies": values["frequencies"] / std,
            "phases": values["phases"] + values["frequencies"] * (mean / std),
        }
    moved = dict(values)
    for slopes, offsets in (("slopes", "offsets"), ("denominator_slopes", "denominator_offsets")):
        if offsets in values:
            moved[offsets] = std * values[offsets] - mean * values[slopes]
    return moved


class _Stream:
    """Mean and variance of numbers that come in chunks, merged in float64 (Chan, Golub and LeVeque, 1979)."""

    def __init__(self) -> None:
        self.samples, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, chunk: Tensor) -> None:
        if chunk.numel() == 0:
            return
        # Devices without float64 (MPS) reduce in float32; chunks are merged in float64 on the host all the same.
        dtype = torch.float32 if chunk.device.type == "mps" else torch.float64
        variance, mean = torch.var_mean(chunk.detach().to(dtype), correction=0)
        count, delta = chunk.numel(), mean.item() - self.mean
        total = self.samples + count
        self._squares += variance.item() * count + delta**2 * self.samples * count / total
        self.mean += delta * count / total
        self.samples = total

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / self.samples)


def _call(model: nn.Module, batch: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)
