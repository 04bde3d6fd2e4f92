"""`compare`: the same training run with several activations and several seeds.

    OUT/SLUG-seedN/     one run, as `train` writes it
    OUT/compare.json    every run's validations, and time and memory of a step, unrounded; rewritten after each run
    OUT/compare.md      the table
    OUT/compare.png     the picture

Runs of one seed share their initial weights and every batch. Seeds are the outer loop, so that an interrupted
comparison is balanced.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ortho_fx.bench.allocation import buffers_are_reused
from ortho_fx.bench.candidates import Candidate, compile_alone
from ortho_fx.bench.config import BenchConfig
from ortho_fx.bench.measure import bench
from ortho_fx.bench.report import environment_of
from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file, reason, remove_unfinished
from ortho_fx.models.compare.activations import Activation, choose_activations
from ortho_fx.models.compare.plot import plot_comparison
from ortho_fx.models.compare.report import ACCURACY, LOSS, ComparedRun, Comparison, StepCost
from ortho_fx.models.data.digest import data_digest
from ortho_fx.models.data.sources import Batch
from ortho_fx.models.recipe import TrainConfig, differences
from ortho_fx.models.runs.files import read_run
from ortho_fx.models.runs.lock import locked
from ortho_fx.models.training.build import build
from ortho_fx.models.training.checkpoint import checkpoints
from ortho_fx.models.training.loop import Diverged, train
from ortho_fx.models.training.optimization import Optimization
from ortho_fx.models.training.processes import Processes, launched
from ortho_fx.plots import load_pyplot

# Settings of a single activation or run, and settings that do not change a run's results.
_NOT_IN_COMMON = {"basis", "degree", "tied", "seed", "out", "workers", "parallel", "save_every", "keep"}
_ROUNDS = 20
_WRITTEN = ("compare.json", "compare.md", "compare.png")
_Planned = tuple[str, TrainConfig]


def compare(
    config: TrainConfig,
    activations: Sequence[str],
    seeds: int,
    out: str | Path,
    *,
    reference: str = "gelu",
    timing: bool = True,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    to_go_on: str = "the same call goes on",
) -> Comparison:
    """Trains every activation with every seed, measures their training steps, and writes compare.json, .md and .png.

    Runs that `out` holds are not trained again: an interrupted comparison goes on, and new activations or seeds are
    added to it. A run that diverges is recorded with its reason, and the others go on.

    Args:
        config: the settings that all runs have in common. Its basis, degree, tied and out are not used; its seed is the
            first.
        activations: as `Activation.parse` reads them.
        seeds: number of seeds.
        out: directory of the comparison.
        reference: the activation that the others are compared with; added if it is not among them.
        timing: whether to measure time and memory of a training step, in turns in this process, after the training.
        overwrite: start anew although `out` holds a comparison; the runs recorded there or asked for are removed.
        progress: called with a line of text whenever a run or a measurement begins.
        to_go_on: what a comparison that ends early advises.

    Raises:
        OrthoFxError: a wrong activation, the same one twice, a comparison with other settings or other data in `out`,
            another comparison that writes there, several processes, no matplotlib, or any error of `train` except
            `Diverged`.
        KeyboardInterrupt, Terminated: after SIGINT or SIGTERM, once the run under way is saved.
    """
    if launched():
        raise OrthoFxError("a comparison is one process that trains one run after the other; torchrun started several")
    if seeds < 1:
        raise OrthoFxError(f"seeds must be 1 or more; got {seeds}")
    out = Path(out)
    chosen = choose_activations(activations, reference, config)
    load_pyplot()  # A missing matplotlib is an error now, not after hours of training.
    planned = [
        (activation.label, activation.configure(config, seed, out))
        for seed in range(config.seed, config.seed + seeds)
        for activation in chosen
    ]
    with locked(out):
        try:
            remove_unfinished(out, _WRITTEN)
            comparison = _open(config, [activation.label for activation in chosen], planned, out, overwrite)
            for number, (label, run) in enumerate(planned, 1):
                if comparison.find(label, run.seed) is None:
                    progress(f"run {number} of {len(planned)}: {label}, seed {run.seed}")
                    comparison.runs.append(_train(label, run, to_go_on))
                    _save(comparison, out)
            if timing and _costs_are_missing(comparison):
                progress("measures a training step of each, in turns")
                _measure(comparison, config, out)
            _save(comparison, out)
            if any(run.diverged is None for run in comparison.runs):
                plot_comparison(comparison, out / "compare.png")
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(str(interrupt) or to_go_on) from None
    return comparison


def load_comparison(out: str | Path) -> Comparison:
    """The comparison of a directory, with the runs that are done so far.

    Raises:
        OrthoFxError: a directory without one, or a file that cannot be read.
    """
    path = Path(out) / "compare.json"
    try:
        return Comparison.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise OrthoFxError(f"cannot read {path}: {reason(error)}") from None


def _open(
    config: TrainConfig, names: Sequence[str], planned: Sequence[_Planned], out: Path, overwrite: bool
) -> Comparison:
    """The comparison in `out`, with the named activations added, or a new one without runs."""
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_IN_COMMON}
    data = build(planned[0][1]).data
    settings["data"], settings["data_sha256"] = data.name, data_digest(data)
    new = Comparison(settings, names[0], list(names), environment_of(_bench_config(config)))
    present = (out / "compare.json").exists()
    if overwrite:
        directories = {run.directory for _, run in planned}
        with contextlib.suppress(OrthoFxError):
            for run in load_comparison(out).runs:
                directories.add(Activation.parse(run.activation).configure(config, run.seed, out).directory)
        for directory in filter(Path.is_dir, directories):
            with locked(directory):
                shutil.rmtree(directory, ignore_errors=True)
    elif present:
        old = load_comparison(out)
        # Comparisons of earlier releases have no digest of their data.
        different = differences({"data_sha256": settings["data_sha256"], **old.settings}, settings)
        if different:
            raise OrthoFxError(
                f"{out} holds a comparison with other settings: {', '.join(different)}; choose another --out, or pass "
                "--overwrite"
            )
        new.activations = list(dict.fromkeys([names[0], *old.activations, *names]))
        new.runs, new.costs, new.costs_environment = old.runs, old.costs, old.costs_environment
    _save(new, out)
    return new


def _save(comparison: Comparison, out: Path) -> None:
    texts = {"compare.json": json.dumps(comparison.to_dict(), indent=1), "compare.md": comparison.report(markdown=True)}
    for name, text in texts.items():
        with atomic_file(out / name) as path:
            path.write_text(text + "\n", encoding="utf-8")


def _train(label: str, config: TrainConfig, to_go_on: str) -> ComparedRun:
    """Trains one run, from its newest checkpoint if it has one."""
    # The previous run's compiled code is of no use here, and it counts towards the compiler's recompilation limits.
    torch.compiler.reset()
    gc.collect()
    diverged = None
    try:
        train(config, resume=bool(checkpoints(config.directory / "checkpoints")), to_go_on=to_go_on)
    except Diverged as error:
        diverged = str(error)
    run = read_run(config.directory)
    measured = {row["step"]: {name: row[name] for name in (LOSS, ACCURACY) if name in row} for row in run.validations}
    validations = {step: values for step, values in measured.items() if math.isfinite(values[LOSS])}
    if diverged is None and config.steps not in validations:
        diverged = f"the validation loss is not finite at step {config.steps}"
    return ComparedRun(
        label,
        config.seed,
        config.directory.name,
        parameters=run.config["parameters"],
        expansion_parameters=run.config["expansion_parameters"],
        validations=validations,
        step_seconds=statistics.median(row["seconds"] for row in run.rows) if run.rows else None,
        diverged=diverged,
    )


def _bench_config(config: TrainConfig) -> BenchConfig:
    on_cpu = config.device.startswith("cpu")
    return BenchConfig(
        config.model,
        device=config.device,
        dtype=config.dtype,
        size=config.size,
        batch_size=config.batch_size,
        rounds=_ROUNDS,
        eager=not config.compile,
        # The runs were trained in this process. If malloc did not reuse buffers then, the measurement must not either.
        fresh=on_cpu and not buffers_are_reused(),
    )


def _costs_are_missing(comparison: Comparison) -> bool:
    same = ("hardware", "threads", "versions")
    moved = any(comparison.environment.get(name) != comparison.costs_environment.get(name) for name in same)
    return moved or any(activation not in comparison.costs for activation in comparison.activations)


def _measure(comparison: Comparison, config: TrainConfig, out: Path) -> None:
    """Measures a training step of every activation of the comparison, in turns."""
    configs = {name: Activation.parse(name).configure(config, config.seed, out) for name in comparison.activations}
    # Neither the initialisation nor the learning rate changes the cost of a step.
    kinds = {name: run.expansion and replace(run.expansion, init="stable") for name, run in configs.items()}
    distinct = {kind: name for name, kind in reversed(kinds.items())}
    measured = {name: configs[name] for name in comparison.activations if name in distinct.values()}
    setting = _bench_config(config)
    report = bench(setting, candidates=_training_steps(measured, setting))
    comparison.costs = {}
    for name, kind in kinds.items():
        row = report[distinct[kind]]
        assert row.peak_bytes is not None
        comparison.costs[name] = StepCost(row.seconds["step"], row.ratios["step"], row.peak_bytes, row.rounds)
    comparison.costs_environment = report.environment


def _training_steps(configs: Mapping[str, TrainConfig], setting: BenchConfig) -> Iterator[Candidate]:
    """The training step of `train` for each config, repeated on one batch; the first is the reference."""
    parts: list[Batch] = []
    for number, (name, config) in enumerate(configs.items()):
        assert config.batch_size is not None
        processes = Processes(0, 1, torch.device(config.device))
        built = build(config, processes.device)
        rows = processes.rows(config.batch_size, config.accumulate)
        for part in rows if not parts else ():
            inputs, targets = built.data.batch(config.seed, 0, config.batch_size, part)
            parts.append((inputs.to(processes.device), targets.to(processes.device)))
        # A learning rate of 0 keeps the weights, and so every round does the same work.
        still = replace(config, lr=0.0, expansion_lr=None, compile=False)
        optimization = Optimization(built.model, still, processes)
        if config.compile:
            optimization.losses = compile_alone(optimization.losses, setting)

        def step(_: object, optimization: Optimization = optimization) -> None:
            optimization.step(0, parts)
            # In the next step the profiler would ignore this free, since it misses the allocation.
            optimization.optimizer.zero_grad(set_to_none=True)

        yield Candidate(name, "expansion" if number else "reference", {"step": step}, config.device, config.compile)
