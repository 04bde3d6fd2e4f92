"""Time and memory of a training step of each activation, measured in turns in one process, and steps of equal time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ortho_fx.bench.allocation import buffers_are_reused
from ortho_fx.bench.candidates import Candidate, compile_alone
from ortho_fx.bench.config import TRAINED, BenchConfig
from ortho_fx.bench.measure import bench
from ortho_fx.models.data.sources import Batch
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.training.build import build
from ortho_fx.models.training.optimization import Optimization
from ortho_fx.models.training.processes import Processes

# A ratio that is wrong by 2 % moves the end of a run by as much. A round for each 20 steps costs little beside a run.
ROUNDS, MOST_ROUNDS, STEPS_A_ROUND = 20, 200, 20
# Runs whose numbers of steps differ by less are the same run.
SAME = 0.01


@dataclass
class StepCost:
    """A training step of one activation, measured in turns with others in one process.

    Args:
        seconds: median over the rounds.
        ratio: median over the rounds of the time divided by that of the first activation in the same round.
        peak_bytes: the most memory that the step held at a time, beyond weights, optimizer state and inputs.
        rounds: how many there were.
        measured: hardware, threads and date of the measurement.
    """

    seconds: float
    ratio: float
    peak_bytes: int
    rounds: int
    measured: str = ""


def equal_time_steps(steps: int, ratio: float) -> int:
    """How many steps take the time of `steps` steps of the reference; `steps` itself if that is within 1 %.

    Args:
        steps: of the reference.
        ratio: time of a step divided by the reference's.
    """
    found = round(steps / ratio)
    return steps if abs(found - steps) <= SAME * steps else found


def bench_config(config: TrainConfig, threads: int | None) -> BenchConfig:
    """The settings of a measurement of this run's training step."""
    on_cpu = config.device.startswith("cpu")
    known = config.model in TRAINED
    assert config.steps is not None
    return BenchConfig(
        config.model if known else "gpt2",  # of whose settings the measurement only has that it trains
        device=config.device,
        dtype=config.dtype,
        size=config.size if known else "tiny",
        batch_size=config.batch_size,
        threads=threads,
        rounds=max(ROUNDS, min(MOST_ROUNDS, config.steps // STEPS_A_ROUND)),
        eager=not config.compile,
        # Runs are trained with the allocator as it is. If malloc does not reuse buffers, the measurement must not.
        fresh=on_cpu and not buffers_are_reused(),
    )


def measure_steps(configs: Mapping[str, TrainConfig], threads: int | None) -> dict[str, StepCost]:
    """The cost of a step of each run by its name; the first is the reference.

    Runs that differ in their starts and rates alone are measured once.

    Args:
        configs: the runs.
        threads: CPU threads (None: all that PyTorch uses).
    """
    kinds = {name: _kind(config) for name, config in configs.items()}
    distinct = {kind: name for name, kind in reversed(kinds.items())}
    chosen = {name: config for name, config in configs.items() if name in distinct.values()}
    setting = bench_config(next(iter(configs.values())), threads)
    report = bench(setting, candidates=_training_steps(chosen, setting))
    environment = report.environment
    count = environment["threads"]
    parts = [
        environment["hardware"],
        f"{count} thread{'' if count == 1 else 's'}" if count else "",
        environment["date"],
    ]
    costs = {}
    for name, kind in kinds.items():
        row = report[distinct[kind]]
        assert row.peak_bytes is not None
        costs[name] = StepCost(
            row.seconds["step"], row.ratios["step"], row.peak_bytes, row.rounds, ", ".join(filter(None, parts))
        )
    return costs


def _kind(config: TrainConfig) -> tuple[object, ...]:
    expansion = config.expansion and replace(config.expansion, init="stable")
    return expansion, config.stock, config.gated, config.freeze


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
        optimization = Optimization(built.model, still, processes, built.loss)
        if config.compile:
            optimization.losses = compile_alone(optimization.losses, setting)

        def step(_: object, optimization: Optimization = optimization) -> None:
            optimization.step(0, parts)
            # In the next step the profiler would ignore this free, since it misses the allocation.
            optimization.zero_grad()

        yield Candidate(name, "expansion" if number else "reference", {"step": step}, config.device, config.compile)
