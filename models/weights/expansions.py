"""A file with the expansions of a model and statistics of their inputs, small enough to keep for every run.

It is a safetensors file. The tensors are the parameters and buffers by their qualified names. The metadata holds the
step and, as JSON for each site, its `ExpansionConfig`, the function that it replaced and its inputs' statistics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ortho_fx.activations.expansion import ExpansionActivation, make_activation
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file, reason
from ortho_fx.numerics.moments import Array
from ortho_fx.passes.vocabulary.targets import BY_NAME, Reference
from ortho_fx.tensor_files import errors_naming, read_safetensors, safetensors_library, with_digest

_FORMAT, _VERSION = "ortho_fx expansions", "1"


@dataclass(frozen=True)
class SiteInputs:
    """Statistics of one expansion's inputs at a measurement.

    Attributes:
        mean, std, low, high: mean, standard deviation (of the population), smallest and largest of all inputs.
        counts: histogram of a sample of the inputs, in equal bins of `interval`.
        interval: an interval with nearly all of the sample; outliers are in no bin.
        samples: size of the sample, with the outliers.
    """

    mean: float
    std: float
    low: float
    high: float
    counts: tuple[int, ...] = ()
    interval: tuple[float, float] = (0.0, 0.0)
    samples: int = 0

    @property
    def edges(self) -> Array:
        """The edges of the bins: one more than there are bins."""
        return np.linspace(*self.interval, len(self.counts) + 1)

    @property
    def density(self) -> Array:
        """The share of the sample in each bin, divided by the bin's width."""
        low, high = self.interval
        return np.array(self.counts) * len(self.counts) / (high - low) / self.samples


@dataclass(frozen=True)
class SavedExpansion:
    """One expansion of a file, on the CPU, and statistics of its inputs; these are None if it was never measured."""

    activation: ExpansionActivation
    inputs: SiteInputs | None


@dataclass(frozen=True)
class SavedExpansions:
    """The expansions of a model at a step, by their qualified names, in the model's order."""

    step: int
    sites: dict[str, SavedExpansion]


def write_expansions(
    path: Path,
    step: int,
    activations: Mapping[str, ExpansionActivation],
    tensors: Mapping[str, Mapping[str, Tensor]],
    inputs: Mapping[str, SiteInputs],
) -> None:
    """Writes a file; an earlier one is replaced as a whole or stays.

    Args:
        path: the file.
        step: the step to which the tensors belong.
        activations: the expansions by name, for their configs, channels and references.
        tensors: parameters and buffers of each, unsharded and on the CPU.
        inputs: statistics of the inputs of the expansions that were measured.

    Raises:
        OrthoFxError: a disk that is full or cannot be written, or no safetensors.
    """
    library = safetensors_library()
    sites = {name: _described(activation, inputs.get(name)) for name, activation in activations.items()}
    metadata = {"format": _FORMAT, "version": _VERSION, "step": str(step), "sites": json.dumps(sites)}
    flat = {f"{name}.{key}": tensor.contiguous() for name, held in tensors.items() for key, tensor in held.items()}
    with atomic_file(path) as partial:
        partial.write_bytes(library.torch.save(flat, with_digest(flat, metadata)))


def load_expansions(path: str | Path) -> SavedExpansions:
    """The expansions of a file that a run wrote, as modules on the CPU.

    Raises:
        OrthoFxError: no such file, a damaged one, one of another format or version, or no safetensors.
    """
    path = Path(path)
    file = read_safetensors(path)
    metadata = file.metadata
    if metadata.get("format") != _FORMAT:
        raise OrthoFxError(f"{path} is not a file of expansions: its format is {metadata.get('format')!r}")
    if metadata.get("version") != _VERSION:
        raise OrthoFxError(f"{path} has version {metadata.get('version')}; this release reads version {_VERSION}")
    try:
        with errors_naming(path):
            sites = json.loads(metadata["sites"])
            rebuilt = {name: _rebuilt(name, described, file.tensors) for name, described in sites.items()}
            return SavedExpansions(int(metadata["step"]), rebuilt)
    except OrthoFxError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise OrthoFxError(f"{path} does not describe its expansions: {reason(error)}") from None


def _described(activation: ExpansionActivation, inputs: SiteInputs | None) -> dict[str, Any]:
    reference = activation.reference
    return {
        "config": activation.config.to_dict(),
        "channels": activation.channels,
        "channel_dim": activation.channel_dim,
        "reference": [reference.target, dict(reference.settings)] if isinstance(reference, Reference) else None,
        "inputs": None if inputs is None else {name: _writable(value) for name, value in asdict(inputs).items()},
    }


def _rebuilt(name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SavedExpansion:
    config = ExpansionConfig.from_dict(described["config"])
    settings = {key: described[key] for key in ("channels", "channel_dim")}
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    dtype = next(iter(own.values())).dtype
    # "stable" avoids a needless fit, since the values come from the file.
    activation = make_activation(replace(config, init="stable"), dtype=dtype, **settings)
    activation.load_state_dict({key: own[key] for key in activation.state_dict()})
    activation.config = config
    activation._reference = (_reference(described["reference"]),)
    inputs = described["inputs"]
    if inputs is not None:
        moments = {key: math.nan if inputs[key] is None else inputs[key] for key in ("mean", "std", "low", "high")}
        low, high = inputs["interval"]
        inputs = SiteInputs(**moments, counts=tuple(inputs["counts"]), interval=(low, high), samples=inputs["samples"])
    return SavedExpansion(activation, inputs)


def _reference(described: list[Any] | None) -> Reference | None:
    # "self_gated" evaluates a formula, and a file may come from anyone, so it is not restored.
    if described is None or described[0] not in BY_NAME or described[0] == "self_gated":
        return None
    return Reference(described[0], tuple(described[1].items()))


def _writable(value: object) -> object:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
