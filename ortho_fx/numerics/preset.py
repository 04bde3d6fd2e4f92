"""Presets: a function that was learned, in a small file from which `init="preset:FILE"` starts.

The function is in standard units, h(z) = f(mean + std z) / std for inputs of this mean and deviation (without the last
division for a gate). So it is calibrated like any other start. The file is JSON. Some come with the package, and are
read by their names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ortho_fx.bases import basis_named
from ortho_fx.config import PRESET, ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file
from ortho_fx.numerics.moments import Array
from ortho_fx.tensor_files import read_json

_FORMAT, _VERSION = "ortho_fx preset", 1
_PACKAGED = resources.files("ortho_fx") / "presets"


@dataclass(frozen=True)
class Preset:
    """A learned function.

    Attributes:
        expansion: its basis, degree and settings; the granularity is "layer".
        parameters: its parameters in standard units, by name, in float64.
        rmse: its root mean square distance from the mean of the functions that were harvested, in standard units and
            for inputs as they were at the end of the runs.
        functions: the number of these functions.
    """

    expansion: ExpansionConfig
    parameters: Mapping[str, Array]
    rmse: float
    functions: int

    def __str__(self) -> str:
        shown = "; ".join(f"{name} {np.array2string(value, precision=4)}" for name, value in self.parameters.items())
        return f"{self.expansion}, the mean of {self.functions} functions up to {self.rmse:.2g}: {shown}"

    def write(self, path: str | Path) -> None:
        """Writes the file; an earlier one is replaced as a whole or stays.

        Raises:
            OrthoFxError: it cannot be written.
        """
        values = {
            "format": _FORMAT,
            "version": _VERSION,
            "expansion": self.expansion.to_dict(),
            "parameters": {name: value.tolist() for name, value in self.parameters.items()},
            "rmse": self.rmse,
            "functions": self.functions,
        }
        with atomic_file(Path(path)) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n")


def presets() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(file.name.removesuffix(".json") for file in _PACKAGED.iterdir() if file.name.endswith(".json"))


def read_preset(path: str | Path) -> Preset:
    """The preset in a file, or the one of that name that comes with the package.

    Raises:
        OrthoFxError: no such file and no such name, or a damaged file, or one of another format or version.
    """
    if str(path) in presets():
        with resources.as_file(_PACKAGED / f"{path}.json") as packaged:
            return _read(packaged)
    if not Path(path).exists():
        raise OrthoFxError(f"there is no file {path}, and these presets come with the package: {', '.join(presets())}")
    return _read(Path(path))


def _read(path: Path) -> Preset:
    values = read_json(path)
    if values.get("format") != _FORMAT:
        raise OrthoFxError(f"{path} is no preset: its format is {values.get('format')!r}; `ortho-fx harvest` makes one")
    if values.get("version") != _VERSION:
        raise OrthoFxError(f"{path} has version {values.get('version')!r} of presets; this release reads {_VERSION}")
    try:
        config = ExpansionConfig.from_dict(values["expansion"])
        parameters = {name: np.array(value, dtype=np.float64) for name, value in values["parameters"].items()}
        preset = Preset(config, parameters, float(values["rmse"]), int(values["functions"]))
    except OrthoFxError as error:
        raise OrthoFxError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OrthoFxError(f"{path} is a damaged preset: {type(error).__name__}: {error}") from None
    assert config.degree is not None
    sizes = {p.name: (p.size(config.degree, config.tied),) for p in basis_named(config.basis).parameters}
    found = {name: value.shape for name, value in parameters.items()}
    if found != sizes or not all(np.isfinite(value).all() for value in parameters.values()):
        raise OrthoFxError(f"{path} is a damaged preset: a {config} expansion has finite parameters of sizes {sizes}")
    return preset


def preset_values(config: ExpansionConfig) -> dict[str, Array]:
    """The parameters with which a config whose init names a preset starts.

    Raises:
        OrthoFxError: as `read_preset`, or a preset that does not fit the config.
    """
    path = config.init.removeprefix(PRESET)
    preset = read_preset(path)
    for name in ("basis", "degree", "granularity", "tied", "gated"):
        wanted: Any = getattr(config, name)
        held: Any = getattr(preset.expansion, name)
        if wanted != held:
            raise OrthoFxError(
                f"the preset {path} has {name} {held!r}, and the expansion that starts from it has {wanted!r}: set "
                f"{name}={held!r}"
            )
    return {name: value.copy() for name, value in preset.parameters.items()}
