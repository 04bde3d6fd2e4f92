"""The trainer: takes the steps of a run and writes its files.

RUN/run.json              the settings, the hardware and the versions
RUN/metrics.jsonl, .csv   one row for each step
RUN/sites.jsonl           one row for each site and validation: the expansion's inputs, and how far it has moved
RUN/coefficients.jsonl    one row for each site and validation: the expansion's parameters, unless they are many
RUN/expansions-start.safetensors, expansions.safetensors   the expansions at the start and at the last validation
RUN/checkpoints/          the newest checkpoints, to resume from
RUN/model.safetensors     the weights at the end
RUN/.lock                 held while a run writes there
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.errors import OrthoFxError, Terminated
from ortho_fx.files import atomic_file, remove_unfinished
from ortho_fx.models.data.digest import data_digest
from ortho_fx.models.data.loader import WorkerLost, load, load_validation
from ortho_fx.models.data.sources import Batch
from ortho_fx.models.recipe import DTYPES, TrainConfig, task_of
from ortho_fx.models.runs.files import RowsWritten, rows_differ
from ortho_fx.models.runs.lock import locked
from ortho_fx.models.training.build import build
from ortho_fx.models.training.checkpoint import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from ortho_fx.models.training.divergence import explain_divergence
from ortho_fx.models.training.ema import MovingAverage
from ortho_fx.models.training.log import ROW_FILES, RunLog
from ortho_fx.models.training.loggers import require_logger
from ortho_fx.models.training.monitor import SiteMonitor
from ortho_fx.models.training.optimization import Optimization, Step
from ortho_fx.models.training.processes import Processes, join, peer_lost
from ortho_fx.models.training.progress import Progress
from ortho_fx.models.training.signals import Signals
from ortho_fx.models.training.space import require_space, size_of, size_to_come
from ortho_fx.models.training.throughput import peak_flops, training_flops
from ortho_fx.models.weights.bundle import save_weights
from ortho_fx.processes import gathered, together
from ortho_fx.toolchain import require_cpp_compiler
from ortho_fx.version import __version__


@dataclass
class Result:
    """The result of a run: its losses and validations by step, also of the steps before it was resumed."""

    config: TrainConfig
    parameters: int
    expansion_parameters: int
    losses: dict[int, float] = field(default_factory=dict)
    validations: dict[int, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0


class Diverged(OrthoFxError):
    """The loss or gradient of a run is no longer finite."""


class _OfData(OrthoFxError):
    """Data that cannot be read; to go on would meet them again."""


_T = TypeVar("_T")
_EXPANSIONS = ("expansions-start.safetensors", "expansions.safetensors")
# The files of a run; while one is written, it has a hidden name that begins with its own.
_WRITTEN = ("run.json", *ROW_FILES, "metrics.csv", "model.safetensors", *_EXPANSIONS)


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, to_go_on: str | None = None) -> Result:
    """Trains a model and writes the run's directory; under torchrun, together with the other processes.

    Args:
        config: the run.
        resume: go on from the directory's newest checkpoint, with any number of processes.
        overwrite: start anew although the directory holds a checkpoint.
        to_go_on: what a run that ends early advises (None: --resume if there is a checkpoint, or to start again).

    Raises:
        OrthoFxError: a logger that is not installed, a directory with a checkpoint but neither flag, one that another
            run writes, no whole checkpoint to resume from, one of another configuration or of a run on other data, a
            disk that is full or cannot be written, a process that is gone, or, once the current step is saved, a
            standard output that was closed. The text says what is kept.
        Diverged: more than `config.skip_bad_steps` steps had a loss or a gradient that is not finite.
        KeyboardInterrupt, Terminated: after SIGINT or SIGTERM, once the current step is done and saved. Their text,
            or `kept`, says what is kept.
    """
    require_logger(config.log)
    # Signals last: while processes join, PyTorch waits for the others in code that lets no handler of Python's run.
    with join(config.device) as processes, Signals():
        return Run(config, processes, to_go_on=to_go_on).start(resume=resume, overwrite=overwrite)


class Run:
    """One run, as one of its processes sees it."""

    def __init__(self, config: TrainConfig, processes: Processes, *, to_go_on: str | None = None) -> None:
        assert config.steps is not None
        assert config.batch_size is not None
        if config.compile and processes.device.type == "cpu":
            require_cpp_compiler("train without compiling: --no-compile, or compile = false in the recipe")
        self.config, self.processes, self.task = config, processes, task_of(config.model)
        self.steps, self.batch_size = config.steps, config.batch_size
        self.directory, self.leads, self.to_go_on = config.directory, processes.rank == 0, to_go_on
        self.rows = processes.rows(config.batch_size, config.accumulate)
        built = build(config, processes.device)
        self.model, self.data, self.notes = built.model, built.data, built.notes
        self.configuration = {**config.configuration(), "data": self.data.name}
        self.digest = together(lambda: data_digest(self.data) if processes.rank == 0 else "")[0]
        expansions = [m for m in self.model.modules() if isinstance(m, ExpansionActivation)]
        self.result = Result(
            config,
            parameters=sum(p.numel() for p in self.model.parameters()),
            expansion_parameters=sum(p.numel() for m in expansions for p in m.parameters()),
        )
        self.probe = self.data.batch(config.seed, 0, config.batch_size, self.rows[0])[0].to(processes.device)
        self.unit_size = self.probe[0].numel() if self.task.kind == "tokens" else 1
        self.peak = None if built.loss else peak_flops(processes.device, DTYPES[config.dtype])
        self.flops = training_flops(self.model, self.probe) if self.peak is not None else 0.0
        self.optimization = Optimization(self.model, config, processes, built.loss)
        self.monitor = SiteMonitor(self.model)
        self.average = MovingAverage(self.model, config.ema) if config.ema else None
        self.workers, self.pin = config.workers or 0, processes.device.type == "cuda"
        self.skipped = 0
        self.saved = 0

    def start(self, *, resume: bool, overwrite: bool) -> Result:
        folder = self.directory / "checkpoints"
        if resume and not checkpoints(folder):
            raise OrthoFxError(f"there is no checkpoint in {folder} to resume from")
        with contextlib.ExitStack() as stack:
            together(lambda: stack.enter_context(locked(self.directory)) if self.leads else None)
            # All processes must have looked for a checkpoint before one of them writes.
            if any(gathered(bool(checkpoints(folder)) and not resume and not overwrite, None)):
                raise OrthoFxError(f"{self.directory} holds a checkpoint: pass --resume or --overwrite")
            checkpoint = self._load() if resume else None
            first = 0 if checkpoint is None else checkpoint.step
            together(lambda: self._prepare(resume, first) if self.leads else None)
            try:
                return self._run(first)
            except Diverged:
                raise
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._kept()) from None
            except Terminated:
                raise Terminated(self._kept()) from None
            except _OfData as error:
                raise OrthoFxError(f"{error}; {self._kept(advised=False)}") from None
            except OrthoFxError as error:
                raise OrthoFxError(f"{error}; {self._kept()}") from None
            except RuntimeError as error:
                if not peer_lost(error, self.processes):
                    raise
                raise OrthoFxError(
                    f"process {self.processes.rank} has lost another process of the run; {self._kept()}"
                ) from None

    def _run(self, first: int) -> Result:
        log = RunLog(self.directory, first, self.leads, self.config.log, asdict(self.config))
        with contextlib.closing(log):
            started = time.perf_counter()
            self._train(log, first)
        if first < self.steps or not (self.directory / "model.safetensors").exists():
            self._export()
        self.result.seconds = time.perf_counter() - started
        return self.result

    def _kept(self, advised: bool = True) -> str:
        """What is left of a run that ends early, and how to go on."""
        found = checkpoints(self.directory / "checkpoints")
        if not found:
            return f"no checkpoint was saved yet: {self.to_go_on or 'start again'}"
        advice = f": {self.to_go_on or 'go on with --resume'}" if advised else ""
        return f"{found[-1]} is kept{advice}"

    def _train(self, log: RunLog, first: int) -> None:
        config = self.config
        for row in log.kept:
            self._note(row)
        if first:
            self.monitor.resume(log.kept_sites)
        else:
            self._measure_sites(log, 0)
        batches = load(
            self.data,
            seed=config.seed,
            first=first,
            last=self.steps,
            size=self.batch_size,
            rows=self.rows,
            workers=self.workers,
            pin=self.pin,
        )
        title = f"{config.model} {config.activation}"
        self._clock = time.perf_counter()
        with (
            contextlib.closing(batches),
            Signals() as signals,
            Progress(
                title, self.steps, self.task.unit, first=first, compiles=config.compile, shown=self.leads
            ) as progress,
        ):
            for note in self.notes:
                progress.line(note)
            signals.delayed = True
            for step, parts in enumerate(_data_errors(batches), first):
                self._step(log, progress, step, [self._on_device(part) for part in parts])
                asked = [signals.asked, signals.terminated, progress.lost is not None]
                counts = self.processes.total(torch.tensor(asked, device=self.processes.device).float())
                stopped, terminated, unheard = counts.tolist()
                if stopped or unheard:
                    self._save(log, step + 1)
                    progress.line(f"stopped after step {step + 1} and saved")
                if stopped:
                    raise Terminated if terminated else KeyboardInterrupt
                if unheard:
                    raise OrthoFxError(f"cannot write to the standard output: {progress.lost or 'see process 0'}")
                self._clock = time.perf_counter()

    def _step(self, log: RunLog, progress: Progress, step: int, parts: list[Batch]) -> None:
        config, done = self.config, step + 1
        taken = self.optimization.step(step, parts)
        paused = time.perf_counter()
        # The time counts from the end of the previous step, since waiting for data is part of a step.
        seconds = paused - self._clock
        row: dict[str, Any] = {"step": done, "loss": taken.loss, "lr": taken.lr}
        row |= {"gradient_norm": taken.gradient_norm, "seconds": seconds}
        if self.peak is not None:
            row["mfu"] = self.flops * self.batch_size / seconds / (self.peak * self.processes.count)
        if not taken.finite:
            row["skipped"] = True
            self.skipped += 1
        elif self.average is not None:
            self.average.update(done)
        rate = progress.step(done, taken.loss, self.batch_size * self.unit_size)
        if done % config.eval_every == 0 or done == self.steps:
            measured = self.validate(progress)
            row |= measured
            self._measure_sites(log, done)
            shown = "  ".join(f"{name.replace('_', ' ')} {number:.4f}" for name, number in measured.items())
            used = f"  {row['mfu']:.0%} of peak" if "mfu" in row else ""
            step_text, loss = f"step {done:>5}", f"loss {taken.loss:.4f}"
            progress.line(
                f"{step_text}  {loss}  {shown}  {rate:,.0f} {self.task.unit}/s{used}",
                f"{step_text}  {loss}  {shown}",
                f"{step_text}  {shown}",
            )
        self._note(row)
        log.row(row)
        if self.skipped > config.skip_bad_steps:
            self._diverged(taken, done, parts)
        if done % config.save_every == 0 or done == self.steps:
            self._save(log, done)
        progress.pause(paused)

    def _note(self, row: dict[str, Any]) -> None:
        self.result.losses[row["step"]] = row["loss"]
        measured: dict[str, float] = {name: row[name] for name in ("validation_loss", "accuracy") if name in row}
        if measured:
            self.result.validations[row["step"]] = measured

    def _diverged(self, taken: Step, step: int, parts: list[Batch]) -> None:
        loss, norm = taken.loss, taken.gradient_norm
        what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        losses = self.optimization.losses
        raise Diverged(
            explain_divergence(self.model, lambda: sum(losses(*part) for part in parts), self.monitor.rows, what, step)
        )

    def validate(self, progress: Progress) -> dict[str, float]:
        """Mean loss in nats over the validation data; for images also the accuracy."""
        batches = self.data.validation_batches(self.validation_size)
        progress.validating(0, batches)
        self.optimization.shared.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.processes.device)
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            (rows,) = self.processes.rows(self.validation_size, 1)
            held = load_validation(self.data, size=self.validation_size, rows=rows, workers=self.workers, pin=self.pin)
            for done, part in enumerate(_data_errors(held), 1):
                totals += self.optimization.evaluate(*self._on_device(part))
                progress.validating(done, batches)
        self.optimization.shared.train()
        loss, correct, count = self.processes.total(totals).tolist()
        measured = {"validation_loss": loss / count}
        return measured | {"accuracy": correct / count} if self.task.kind == "images" else measured

    @property
    def validation_size(self) -> int:
        """Rows of a validation batch: as many as in micro-batches of all processes, so that memory and shapes fit."""
        return self.batch_size // self.config.accumulate

    def _measure_sites(self, log: RunLog, step: int) -> None:
        log.site_rows(self.monitor.measure(lambda: self.optimization.logits(self.probe), step))
        log.coefficient_rows(self.monitor.coefficients(step))
        if self.leads and self.result.expansion_parameters:
            name = "expansions.safetensors" if step else "expansions-start.safetensors"
            self.monitor.save_expansions(self.directory / name, step)

    def _on_device(self, batch: Batch) -> Batch:
        inputs, targets = (tensor.to(self.processes.device, non_blocking=True) for tensor in batch)
        return inputs, targets

    def _prepare(self, resume: bool, first: int) -> None:
        """Writes run.json. Unless the run resumes, removes an earlier run's checkpoints, weights and expansions.

        What a killed run has left half-written is removed as well.
        """
        try:
            remove_unfinished(self.directory, _WRITTEN)
            if not resume:
                remove_checkpoints(self.directory / "checkpoints")
                for name in ("model.safetensors", *_EXPANSIONS):
                    (self.directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise OrthoFxError(f"cannot write to {self.directory}: {error.strerror}") from None
        if first < self.steps:
            require_space(self.directory, size_to_come(self.model, self.average is not None))
        device = self.processes.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        described = {
            **asdict(self.config),
            "data_name": self.data.name,
            "bytes_per_token": getattr(self.data, "bytes_per_token", None),
            "parameters": self.result.parameters,
            "expansion_parameters": self.result.expansion_parameters,
            "ortho_fx": __version__,
            "torch": torch.__version__,
            "processes": self.processes.count,
            "hardware": f"{device.type}, {name}",
        }
        with atomic_file(self.directory / "run.json") as temporary:
            temporary.write_text(json.dumps(described, indent=1) + "\n")

    def _state(self) -> dict[str, Any]:
        """The content of a checkpoint: tensors by qualified names; each process has its own shards."""
        model, optimizer = get_state_dict(self.model, self.optimization.optimizers)
        state = {"model": model, "optimizer": optimizer}
        return state if self.average is None else {**state, "average": self.average.averages}

    def _save(self, log: RunLog, step: int) -> None:
        if step == self.saved:
            return
        state = self._state()
        # Flushed first: rows survive whatever the checkpoint survives.
        rows = together(lambda: self._ready(log, size_of(state)) if self.leads else {})[0]
        save_checkpoint(
            self.directory / "checkpoints",
            step,
            state,
            self.configuration,
            self.processes,
            self.config.keep,
            skipped=self.skipped,
            data=self.digest,
            rows=rows,
        )
        self.saved = step

    def _ready(self, log: RunLog, size: int) -> dict[str, RowsWritten]:
        require_space(self.directory, size)
        return log.flush()

    def _load(self) -> Checkpoint:
        """Reads the newest whole checkpoint into the model, the optimizer and the average."""

        def differ(checkpoint: Checkpoint) -> str | None:
            differences = (rows_differ(self.directory / name, written) for name, written in checkpoint.rows.items())
            return next(filter(None, differences), None)

        state = self._state()
        checkpoint, note = load_checkpoint(
            self.directory / "checkpoints",
            self.configuration,
            state,
            self.processes,
            data=self.digest,
            rows_differ=differ,
        )
        if note and self.leads:
            print(f"ortho-fx: warning: {note}", file=sys.stderr, flush=True)
        set_state_dict(
            self.model,
            self.optimization.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.skipped = checkpoint.skipped
        return checkpoint

    def _export(self) -> None:
        """Writes model.safetensors, with the averaged weights if there is an average.

        Such a file describes the activations of our models and expansions, so runs with others have none.
        """
        if self.config.stock is not None or self.task.kind == "samples":
            return
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            whole = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.leads:
            last = self.result.validations.get(self.steps, {})
            description = {"run": asdict(self.config), **last}
            save_weights(self.model, self.directory / "model.safetensors", description, cast(dict[str, Tensor], whole))
        self.processes.wait()


def _data_errors(batches: Iterable[_T]) -> Iterator[_T]:
    """The same batches; an error of the data is told from the others."""
    try:
        yield from batches
    except WorkerLost:
        raise
    except OrthoFxError as error:
        raise _OfData(str(error)) from None
