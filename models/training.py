"""The trainer: builds a model, makes its activations learnable, compiles it, and trains it with checkpoints."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx.activations import ExpansionActivation
from ortho_fx.calibration import calibrate_
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.models import convnext, gpt2
from ortho_fx.models.checkpoint import load_checkpoint, save_checkpoint
from ortho_fx.models.data import Data, Digits, StandardLibrary
from ortho_fx.models.progress import Progress
from ortho_fx.optimizer import param_groups
from ortho_fx.rewrite import rewrite_


@dataclass(frozen=True)
class Task:
    """A kind of model with its data: how to build both by the name of a size, and what one sample is called."""

    presets: dict[str, Any]
    build: Callable[[Any], nn.Module]
    data: Callable[[Any], Data]
    unit: str
    lr: float
    steps: int
    batch_size: int


TASKS: dict[str, Task] = {
    "gpt2": Task(gpt2.PRESETS, gpt2.GPT2, lambda preset: StandardLibrary(preset.context), "tokens", 4e-3, 300, 16),
    "convnext": Task(convnext.PRESETS, convnext.ConvNeXt, lambda preset: Digits(), "images", 4e-3, 300, 64),
}


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Fields that are None take the model's own default.

    Args:
        model: "gpt2" or "convnext".
        size: a preset of the model; "tiny" is made for a CPU and for the bundled data.
        basis: basis of the expansions, or "none" for the untouched model.
        degree, init, granularity, clamp, tied: as in `ExpansionConfig`.
        calibrate: whether the expansions start fitted to the model's own pre-activations (`calibrate_`).
        lr, expansion_lr: peak learning rates of the model and of the expansions (None: `lr`).
        warmup: steps of linear warm-up, then a cosine to a tenth of the peak.
        clip: largest norm of the gradient.
        eval_every, save_every: steps between validations and between checkpoints; the last step has both.
        out: directory of the checkpoint and of metrics.jsonl.
        compile: whether torch.compile is used.
    """

    model: str = "gpt2"
    size: str = "tiny"
    basis: str = "hermite"
    degree: int | None = None
    init: str = "stable"
    granularity: str = "layer"
    clamp: float | None = None
    tied: bool = False
    calibrate: bool = True
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    expansion_lr: float | None = None
    weight_decay: float = 0.1
    warmup: int = 30
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 100
    save_every: int = 500
    out: str | None = None
    compile: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        _one_of("model", self.model, TASKS)
        task = TASKS[self.model]
        _one_of("size", self.size, task.presets)
        if self.expansion is not None:
            object.__setattr__(self, "degree", self.expansion.degree)
        elif self.degree is not None:
            raise OrthoFxError(f"degree goes with a basis, and basis is 'none'; got {self.degree}")
        for name in ("steps", "batch_size", "lr"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(task, name))
        integers = {"steps": 1, "batch_size": 1, "warmup": 0, "seed": 0, "eval_every": 1, "save_every": 1}
        for name, least in integers.items():
            if getattr(self, name) < least:
                raise OrthoFxError(f"{name} must be {least} or more; got {getattr(self, name)}")
        if not self.clip > 0:
            raise OrthoFxError(f"clip must be above zero; got {self.clip}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError):
            raise OrthoFxError(f"device {self.device!r} is not available on this machine") from None

    @property
    def expansion(self) -> ExpansionConfig | None:
        """The expansion that replaces the model's activations."""
        expansion = (self.basis, self.degree, self.init, self.granularity, self.clamp, self.tied)
        return None if self.basis == "none" else ExpansionConfig(*expansion)

    @property
    def directory(self) -> Path:
        kind = "gelu" if self.expansion is None else f"{self.basis}{self.degree}"
        return Path(self.out or f"runs/{self.model}-{self.size}-{kind}")

    def configuration(self) -> dict[str, Any]:
        """The fields that a checkpoint must share with the run that resumes from it."""
        free = {"out", "eval_every", "save_every", "compile", "device"}
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass
class Result:
    """What a run came to: the loss of each step, those before it was resumed included, and its validations."""

    config: TrainConfig
    parameters: int
    expansion_parameters: int
    losses: dict[int, float] = field(default_factory=dict)
    validations: dict[int, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Result:
    """Trains a model and writes `checkpoint.pt` and `metrics.jsonl` into the run's directory.

    Args:
        config: the run.
        resume: go on from the directory's checkpoint.
        overwrite: start anew although the directory holds a checkpoint.

    Raises:
        OrthoFxError: a directory with a checkpoint and neither flag, a checkpoint of another configuration, a disk
            that cannot be written, or a loss that is no longer finite.
    """
    return _Run(config).start(resume=resume, overwrite=overwrite)


class _Run:
    def __init__(self, config: TrainConfig) -> None:
        task = TASKS[config.model]
        preset = task.presets[config.size]
        self.config, self.unit = config, task.unit
        self.path = config.directory / "checkpoint.pt"
        self.metrics = config.directory / "metrics.jsonl"
        self.data = task.data(preset)
        self.configuration = {**config.configuration(), "data": self.data.name}
        torch.manual_seed(config.seed)
        self.model = task.build(preset).to(config.device)
        if config.expansion is not None:
            assert config.batch_size is not None
            inputs = self.data.batch(config.seed, 0, config.batch_size)[0].to(config.device)
            rewrite_(self.model, config.expansion, example_inputs=inputs)
            if config.calibrate:
                calibrate_(self.model, [inputs])
        assert config.lr is not None
        groups = param_groups(
            self.model, lr=config.lr, weight_decay=config.weight_decay, expansion_lr=config.expansion_lr
        )
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        backend = "inductor" if config.expansion is None else "ortho_fx"
        self.loss = torch.compile(self._loss, backend=backend) if config.compile else self._loss
        expansions = [m for m in self.model.modules() if isinstance(m, ExpansionActivation)]
        self.result = Result(
            config,
            parameters=sum(p.numel() for p in self.model.parameters()),
            expansion_parameters=sum(p.numel() for m in expansions for p in m.parameters()),
        )

    def start(self, *, resume: bool, overwrite: bool) -> Result:
        first = 0
        if resume:
            first = self._resume()
        elif self.path.exists() and not overwrite:
            raise OrthoFxError(f"{self.path.parent} holds a checkpoint: pass --resume or --overwrite")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for row in _keep_metrics(self.metrics, first):
                self._note(row)
        except OSError as error:
            raise OrthoFxError(f"cannot write to {self.path.parent}: {error.strerror}") from None
        started = time.perf_counter()
        assert self.config.steps is not None
        name = self.config.expansion or "gelu"
        title = f"{self.config.model} {name}"
        with _Interruption() as interruption, Progress(title, self.config.steps, self.unit) as progress:
            for step in range(first, self.config.steps):
                self._step(step, progress)
                if interruption.asked:
                    self._save(step + 1)
                    raise KeyboardInterrupt
        self.result.seconds = time.perf_counter() - started
        return self.result

    def _step(self, step: int, progress: Progress) -> None:
        config = self.config
        assert config.steps is not None
        assert config.batch_size is not None
        scale = learning_rate_scale(step, config.steps, config.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        inputs, targets = (t.to(config.device) for t in self.data.batch(config.seed, step, config.batch_size))
        loss = self.loss(inputs, targets)[0]
        value = loss.item()
        if not math.isfinite(value):
            raise OrthoFxError(
                f"the loss is {value} at step {step + 1}: try a lower --lr or --expansion-lr, or --init stable"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        done = step + 1
        rate = progress.step(done, value, targets.numel())
        paused = time.perf_counter()
        row: dict[str, Any] = {"step": done, "loss": value, "lr": config.lr * scale if config.lr else 0.0}
        if done % config.eval_every == 0 or done == config.steps:
            measured = self.validate()
            row |= measured
            shown = "  ".join(f"{name.replace('_', ' ')} {number:.4f}" for name, number in measured.items())
            progress.line(f"step {done:>5}  loss {value:.4f}  {shown}  {rate:,.0f} {self.unit}/s")
        self._note(row)
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OrthoFxError(f"cannot write {self.metrics}: {error.strerror}") from None
        if done % config.save_every == 0 or done == config.steps:
            self._save(done)
        progress.pause(paused)

    def _note(self, row: dict[str, Any]) -> None:
        self.result.losses[row["step"]] = row["loss"]
        measured: dict[str, float] = {name: row[name] for name in ("validation_loss", "accuracy") if name in row}
        if measured:
            self.result.validations[row["step"]] = measured

    def validate(self) -> dict[str, float]:
        """Mean loss in nats, and for images the share that is classified rightly, over the validation batches."""
        assert self.config.batch_size is not None
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        batches = 0
        with torch.no_grad():
            for inputs, targets in self.data.validation(self.config.batch_size):
                totals += torch.stack(
                    [t.cpu() for t in self.loss(*(t.to(self.config.device) for t in (inputs, targets)))]
                )
                batches += 1
        self.model.train()
        loss, accuracy = (totals / batches).tolist()
        measured = {"validation_loss": loss}
        return measured | {"accuracy": accuracy} if self.config.model == "convnext" else measured

    def _loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # The mean loss and the share of right answers, which only a validation asks for.
        logits = self.model(inputs).flatten(0, -2)
        targets = targets.flatten()
        loss = F.cross_entropy(logits, targets)
        correct = loss if self.model.training else (logits.argmax(-1) == targets).float().mean()
        return loss, correct

    def _save(self, step: int) -> None:
        state = {
            "configuration": self.configuration,
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.config.device.startswith("cuda"):
            state["cuda_rng"] = torch.cuda.get_rng_state(self.config.device)
        save_checkpoint(self.path, state)

    def _resume(self) -> int:
        state = load_checkpoint(self.path, self.configuration)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and self.config.device.startswith("cuda"):
            torch.cuda.set_rng_state(state["cuda_rng"], self.config.device)
        return int(state["step"])


class _Interruption:
    """Has a first Ctrl-C wait for the end of the step, so that weights and step agree; a second one stops at once."""

    def __enter__(self) -> _Interruption:
        self.asked = False
        # Python takes signals in its main thread only; elsewhere an interrupt is not ours to catch.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def learning_rate_scale(step: int, steps: int, warmup: int) -> float:
    """Linear from 1 / warmup to 1, then a cosine from 1 to 0.1 at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _keep_metrics(path: Path, steps: int) -> list[dict[str, Any]]:
    """Drops the rows after `steps`, which the run is about to write again, and returns the others."""
    # What follows the last newline is a row that a full disk or a crash cut short.
    rows = path.read_text().split("\n")[:-1] if path.exists() and steps else []
    kept = [row for row in map(json.loads, rows) if row["step"] <= steps]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return kept


def _one_of(name: str, value: str, allowed: dict[str, Any]) -> None:
    if value not in allowed:
        raise OrthoFxError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
