"""`TrainConfig`, the one description of a training run, and recipes: TOML files of its fields.

Every field is a key of a recipe and an option of the command line, by the same name. The command line overrides the
recipe, and the recipe overrides the model's own defaults.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ortho_fx.bases import BASES
from ortho_fx.config import INITS, ExpansionConfig, basis_of, default_basis, what_ties
from ortho_fx.errors import OrthoFxError
from ortho_fx.files import reason
from ortho_fx.models import convnext, gpt2
from ortho_fx.models.custom import is_custom
from ortho_fx.models.data.augment import AUGMENTS
from ortho_fx.models.data.batch import Kind
from ortho_fx.models.stock import Stock

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Characters of a recipe.
_LONGEST = 2**20
PARALLEL = ("ddp", "fsdp")
OPTIMIZERS = ("adamw", "adam", "muon")
# Settings of `TrainConfig` that checkpoints of earlier releases lack, since they had none of them.
_ADDED = ("gated", "freeze", "stock", "expansion_decay", "optimizer", "expansion_min_lr")
LOGGERS = ("tensorboard", "wandb", "trackio", "none")


@dataclass(frozen=True)
class Task:
    """A kind of model: its presets and classes, its kind of data, and the defaults of a run."""

    presets: Mapping[str, gpt2.GPT2Config] | Mapping[str, convnext.ConvNeXtConfig]
    model: type[torch.nn.Module]
    block: type[torch.nn.Module]
    kind: Kind
    unit: str
    data: str
    steps: int
    batch_size: int
    lr: float


TASKS: dict[str, Task] = {
    "gpt2": Task(gpt2.PRESETS, gpt2.GPT2, gpt2.Block, "tokens", "tokens", "standard-library", 300, 16, 4e-3),
    "convnext": Task(convnext.PRESETS, convnext.ConvNeXt, convnext.Block, "images", "images", "digits", 300, 64, 4e-3),
}
# A model of a user's file, whose batches are its data.
_CUSTOM = Task({}, torch.nn.Module, torch.nn.Module, "samples", "samples", "batches of the file", 300, 64, 1e-3)


def task_of(model: str) -> Task:
    """The task of a model: that of `TASKS`, or that of a user's file."""
    return _CUSTOM if is_custom(model) else TASKS[model]


def _setting(default: Any, text: str | Callable[[], str], kind: type | None = None) -> Any:
    """A field with its text for `--help`, and its type if the default does not have that type.

    A function as `text` is called when the help is made.
    """
    return field(default=default, metadata={"help": text, "type": kind or type(default)})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Fields that are None take the model's own default.

    `settings()` lists the fields with their purpose; the command line's help is made from it.

    Raises:
        OrthoFxError: a value that is unknown, out of range, or not available on this machine.
    """

    model: str = _setting("gpt2", f"what is trained: {', '.join(TASKS)}")
    size: str = _setting("tiny", "preset of the model: tiny, small, 11m of gpt2, or a published size")
    start_from: str | None = _setting(
        None, "weights to fine-tune: a run, a file or a folder of ours, of transformers' GPT-2 or timm's ConvNeXt", str
    )
    dropout: float = _setting(0.0, "dropout of gpt2")
    gated: bool = _setting(False, "give the model SwiGLU MLPs of as many parameters; expansions replace their SiLU")
    drop_path: float = _setting(0.0, "stochastic depth of convnext, the rate of its last block")

    basis: str = _setting(
        None,
        lambda: f"{', '.join(BASES)}, or none for the untouched model (default: {default_basis()})",
        str,
    )
    degree: int | None = _setting(None, "degree of the expansions (default: that of the basis)", int)
    init: str | None = _setting(
        None,
        f"start of the expansions: {', '.join(INITS)}, depth:LAYERS or preset:FILE "
        "(default: stable, or fit with start_from)",
        str,
    )
    granularity: str = _setting("layer", "one expansion a layer, model, channel or group:N")
    clamp: float | None = _setting(None, "cut inputs off so many standard deviations from their mean", float)
    tied: bool = _setting(False, lambda: f"make the {what_ties()} multiples of one that learns")
    calibrate: bool = _setting(True, "start expansions for the inputs that the model really has, not for N(0, 1)")
    stock: str | None = _setting(
        None,
        "with basis none, the activation in place of the model's own: relu, relu_squared, gelu:calibrated, ...",
        str,
    )
    freeze: bool = _setting(False, "fix the expansions at their start, as functions in which nothing learns")

    data: str | None = _setting(
        None, "standard-library, digits, or a path: tokens, text, IDX files or image folders (default: by model)", str
    )
    image_size: int | None = _setting(None, "side that images of a folder are cut to, in pixels (default 224)", int)
    augment: str | None = _setting(None, "none, light, flip, crop or randaugment (default: by data)", str)
    mixup: float = _setting(0.0, "alpha of mixup; 0 is none")
    cutmix: float = _setting(0.0, "alpha of cutmix; 0 is none")
    label_smoothing: float = _setting(0.0, "share of the target that goes to all classes alike")
    workers: int | None = _setting(None, "processes that load batches (default: 4 on cuda, else none)", int)

    steps: int | None = _setting(None, "optimizer steps", int)
    batch_size: int | None = _setting(None, "sequences or images an optimizer step, over all processes", int)
    accumulate: int = _setting(1, "parts that each process computes its share of a batch in, one after the other")
    optimizer: str = _setting("adamw", f"of the weights: {', '.join(OPTIMIZERS)}; expansions learn by AdamW")
    lr: float | None = _setting(None, "peak learning rate", float)
    expansion_lr: float | None = _setting(None, "peak learning rate of the expansions (default: lr)", float)
    weight_decay: float = _setting(0.1, "decay of weight matrices")
    expansion_decay: float = _setting(0.0, "decay of the expansions' parameters")
    beta2: float = _setting(0.95, "decay of AdamW's mean of squared gradients")
    warmup: int = _setting(30, "steps of linear warm-up")
    min_lr: float = _setting(0.1, "share of the peak learning rate at which the cosine ends")
    expansion_min_lr: float | None = _setting(
        None, "the same for the learning rate of the expansions (default: min_lr)", float
    )
    clip: float = _setting(1.0, "largest norm of the gradient of the weights, and of that of the expansions")
    ema: float = _setting(0.0, "decay of a moving average of the weights, which validation and export use; 0 is none")
    seed: int = _setting(0, "seed of weights, batches and dropout")
    skip_bad_steps: int = _setting(0, "steps with a loss or gradient that is not finite to leave out before stopping")

    dtype: str = _setting("float32", "float32, or bfloat16 for autocast")
    device: str = _setting("cpu", "cpu or cuda; under torchrun each process takes its own")
    parallel: str = _setting("ddp", "what torchrun's processes share: ddp, or fsdp for sharded parameters")
    compile: bool = _setting(True, "use torch.compile")

    eval_every: int = _setting(100, "steps between validations")
    save_every: int = _setting(500, "steps between checkpoints")
    log: str = _setting(
        "tensorboard", "where curves are shown besides the run's own files: tensorboard, wandb, trackio or none"
    )
    keep: int = _setting(2, "checkpoints that are kept, the newest")
    out: str | None = _setting(None, "directory of the run (default: runs/MODEL-SIZE-BASISDEGREE)", str)

    def __post_init__(self) -> None:
        for setting in fields(self):
            object.__setattr__(self, setting.name, _typed(setting, getattr(self, setting.name)))
        object.__setattr__(self, "basis", basis_of(self.basis, self.degree))
        custom = is_custom(self.model)
        if not custom:
            one_of("model", self.model, TASKS)
            one_of("size", self.size, TASKS[self.model].presets)
        task = task_of(self.model)
        for name in ("start_from", "data", "image_size", "augment", "gated", "label_smoothing") if custom else ():
            if getattr(self, name) and getattr(self, name) != getattr(task, name, None):
                raise OrthoFxError(f"{name} is a setting of our own models; that of {self.model} is in its file")
        if custom:
            if self.size not in ("tiny", "custom"):
                raise OrthoFxError(f"size is a setting of our own models; got {self.size}")
            object.__setattr__(self, "size", "custom")
            object.__setattr__(self, "workers", 0)  # the file's batches are read in order, in this process
        if self.init is None:
            object.__setattr__(self, "init", "fit" if self.start_from else "stable")
        if self.expansion is None and self.freeze:
            raise OrthoFxError("freeze goes with a basis, and basis is 'none'")
        for name in ("expansion_lr", "expansion_min_lr") if self.freeze else ():
            value = getattr(self, name)
            if value is not None:
                raise OrthoFxError(f"frozen expansions do not learn: leave out {name}, which is {value:g}")
        if self.stock is not None:
            if self.expansion is not None:
                raise OrthoFxError(f"stock goes with basis none; got stock {self.stock} and basis {self.basis}")
            object.__setattr__(self, "stock", str(Stock.parse(self.stock)))
        if self.expansion is not None:
            object.__setattr__(self, "degree", self.expansion.degree)
        elif self.degree is not None:
            raise OrthoFxError(f"degree goes with a basis, and basis is 'none'; got {self.degree}")
        for name in ("data", "steps", "batch_size", "lr"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(task, name))
        if self.workers is None:
            object.__setattr__(self, "workers", 4 if self.device.startswith("cuda") else 0)
        one_of("dtype", self.dtype, DTYPES)
        one_of("parallel", self.parallel, PARALLEL)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise OrthoFxError("muon needs whole matrices, and fsdp shards them: use ddp, or adamw")
        one_of("log", self.log, LOGGERS)
        if self.augment is not None:
            one_of("augment", self.augment, AUGMENTS)
        least: dict[str, float] = dict.fromkeys(
            ("steps", "batch_size", "accumulate", "eval_every", "save_every", "keep"), 1
        )
        least |= dict.fromkeys(("warmup", "seed", "skip_bad_steps", "workers"), 0)
        least |= dict.fromkeys(("lr", "expansion_lr", "weight_decay", "expansion_decay"), 0.0)
        least |= dict.fromkeys(("min_lr", "expansion_min_lr"), 0.0)
        least |= dict.fromkeys(("mixup", "cutmix"), 0.0)
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise OrthoFxError(f"{name} must be {low:g} or more; got {value}")
        for name in ("dropout", "drop_path", "label_smoothing", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise OrthoFxError(f"{name} must be from 0 to below 1; got {getattr(self, name)}")
        if not self.clip > 0:
            raise OrthoFxError(f"clip must be above zero; got {self.clip}")
        for name, only in (
            ("dropout", "gpt2"),
            ("drop_path", "convnext"),
            ("mixup", "convnext"),
            ("cutmix", "convnext"),
        ):
            if getattr(self, name) and self.model != only:
                raise OrthoFxError(f"{name} is a setting of {only}; the model is {self.model}")
        try:
            torch.empty(0, device=self.device)
        except Exception:  # PyTorch raises errors of many kinds for devices that it knows by name alone
            raise OrthoFxError(f"device {self.device!r} is not available on this machine") from None
        if self.seed >= 2**63:
            raise OrthoFxError(f"seed must be below 2^63; got {self.seed}")
        if "\0" in f"{self.out}{self.data}{self.start_from}":
            raise OrthoFxError("paths have no zero byte; got one in out, data or start_from")

    @classmethod
    def settings(cls) -> tuple[Field[Any], ...]:
        """The fields, each with its "help" and "type" in `metadata`."""
        return tuple(_with_text(setting) for setting in fields(cls))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config with these values; an unknown key is an error that lists the known ones."""
        known = [setting.name for setting in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise OrthoFxError(f"unknown setting {', '.join(map(repr, unknown))}; settings are {', '.join(known)}")
        return cls(**values)

    @property
    def expansion(self) -> ExpansionConfig | None:
        """The expansion that replaces the model's activations."""
        assert self.init is not None
        expansion = (self.basis, self.degree, self.init, self.granularity, self.clamp, self.tied, self.gated)
        return None if self.basis == "none" else ExpansionConfig(*expansion)

    @property
    def activation(self) -> str:
        """The activation in a few words, for tables and titles."""
        if self.stock is not None:
            return f"{self.stock} gated" if self.gated else self.stock
        if self.expansion is None:
            return "silu gated" if self.gated else "gelu"
        return f"{self.expansion} frozen" if self.freeze else str(self.expansion)

    @property
    def directory(self) -> Path:
        kind = (self.stock or "gelu").replace(":", "") if self.expansion is None else f"{self.basis}{self.degree}"
        more = "-gated" * self.gated + "-frozen" * self.freeze
        return Path(self.out or f"runs/{self.model}-{self.size}-{kind}{more}")

    def configuration(self) -> dict[str, Any]:
        """The fields that a checkpoint must share with the run that resumes from it.

        Those of `_ADDED` are among them only if they differ from their defaults.
        """
        free = {"data", "workers", "accumulate", "parallel", "device", "compile", "out"}
        free |= {"eval_every", "save_every", "keep", "skip_bad_steps", "log"}
        free |= {one.name for one in fields(self) if one.name in _ADDED and getattr(self, one.name) == one.default}
        return {name: value for name, value in asdict(self).items() if name not in free}


def load_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe: a TOML file by its path, or one that comes with the package by its name.

    Raises:
        OrthoFxError: no such recipe, or one that is not TOML. `TrainConfig` checks the keys.
    """
    path = Path(name)
    bundled = resources.files(__package__) / "recipes" / f"{name}.toml"
    if path.suffix != ".toml" and bundled.is_file():
        text = bundled.read_text(encoding="utf-8")
    else:
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(_LONGEST + 1)
        except (OSError, ValueError) as error:  # ValueError: no text, or a path with a zero byte
            told = getattr(error, "strerror", None) or "it is not text"
            raise OrthoFxError(
                f"cannot read recipe {name}: {told}; recipes are TOML files, and these come with the package: "
                f"{', '.join(recipes())}"
            ) from None
    if len(text) > _LONGEST:
        raise OrthoFxError(f"recipe {name} has more than {_LONGEST} characters, so it is none")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise OrthoFxError("recipes need tomli before Python 3.11: pip install tomli") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        raise OrthoFxError(f"recipe {name} is not TOML: {reason(error)}") from None


def _with_text(setting: Field[Any]) -> Field[Any]:
    """The field with its help as text."""
    text = setting.metadata["help"]
    if isinstance(text, str):
        return setting
    written = copy.copy(setting)
    written.metadata = MappingProxyType({**setting.metadata, "help": text()})
    return written


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(Path(file.name).stem for file in (resources.files(__package__) / "recipes").iterdir())


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The settings in which a saved configuration differs from that of this run, a text for each."""
    return [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]


def one_of(name: str, value: str, allowed: Mapping[str, Any] | Sequence[str]) -> None:
    if value not in allowed:
        raise OrthoFxError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _typed(setting: Field[Any], value: Any) -> Any:
    """The value in its field's type. An integer is accepted for a float, since TOML files have such values."""
    kind = setting.metadata["type"]
    if value is None and setting.default is None:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise OrthoFxError(f"{setting.name} must be {names[kind]}; got {value!r}")
    if value == "":
        raise OrthoFxError(f"{setting.name} is empty: leave it out for its default")
    if kind is float and not math.isfinite(value) and setting.name != "clip":
        raise OrthoFxError(f"{setting.name} must be finite; got {value}")
    return value
