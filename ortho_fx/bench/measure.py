"""Measures the speed of activations relative to F.gelu, for `ortho-fx bench` and benchmarks/speed.py.

All candidates are measured in one process, in turns. Every round calls each candidate once, in a new random order,
because the candidate before affects caches and threads. A ratio is a candidate's time divided by GELU's time of the
same round, as the median over the rounds. So other work on the machine affects all candidates alike. Read ratios, not
milliseconds.

On a CPU PyTorch has no caching allocator, so there are two different times:

- *buffers reused* (default): the time of the kernels. malloc keeps freed blocks, so outputs get memory that is already
  mapped. Activations run like this on a GPU, and in a model with a caching allocator.
- *fresh allocations* (`fresh=True`): the default malloc maps a large output again at each call, and the first kernel
  that writes to it waits for one page fault per 4 KiB. For a large tensor this is most of the time, and it is the same
  for every activation.

Reports include the page faults of a call, which show which of the two was measured. On a GPU, a time is that between
two events in a queue that was filled before, with the L2 cache flushed before each forward and each backward.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ortho_fx import torch_private
from ortho_fx.bases import BASES, basis_named
from ortho_fx.bench.allocation import Reuse, page_faults
from ortho_fx.bench.candidates import Candidate, compilation_subject, make_candidates
from ortho_fx.bench.config import DEFAULT_EXPANSIONS, BenchConfig
from ortho_fx.bench.report import Measurement, Report, environment_of
from ortho_fx.config import ExpansionConfig, what_ties
from ortho_fx.errors import OrthoFxError
from ortho_fx.operators.generated_code import count_kernels, generated_code

# A candidate slower than this multiple of GELU's time is measured in only so many rounds.
_SLOW_ROUNDS = ((50.0, 1), (8.0, 3))
_WARM_UP, _LONGEST_WARM_UP = 2, 8
_SETTLED_FAULTS = 64
_LONG = 0.5  # seconds; a longer call needs no further warm-up


def bench(
    config: BenchConfig,
    progress: Callable[[str], None] = lambda line: None,
    candidates: Iterable[Candidate] | None = None,
) -> Report:
    """Measures every candidate under a config.

    Args:
        config: the settings.
        progress: called with a line of text before every part that may take seconds.
        candidates: candidates to measure instead of those of the config, the reference first. They are made with the
            config's number of threads.

    Raises:
        OrthoFxError: see `BenchConfig`. If a peer fails, its measurement holds the error.
    """
    current = torch.cuda.device(config.device) if config.device_type == "cuda" else contextlib.nullcontext()
    with _threads(config), _no_collection(), current:
        torch.compiler.reset()
        reused = config.device_type == "cpu" and not config.fresh and Reuse.start(8 * config.tensor_bytes)
        buffers = "buffers reused" if reused else "fresh allocations"
        timer = _timer(config)
        chosen = make_candidates(config) if candidates is None else candidates
        measured = [_Measured(c, Measurement(c.name, c.kind)) for c in chosen]
        for m in measured:
            progress(f"{m.result.name}: compiles and warms up")
            m.prepare(timer, settle=reused)
        working = [m for m in measured if m.result.error is None]
        _take_turns(working, config, timer, progress)
        for m in working:
            m.summarise(working)
        environment = environment_of(config, buffers)
        results = [m.result for m in measured]
        if config.compile_time:
            times = compile_times(config, progress=progress)
            for result in results:
                if result.name in times:
                    result.compile_seconds = times[result.name]
                    result.compile_ratio = times[result.name] / times["gelu"]
    return Report(config, results, environment)


def choose_expansions(
    bases: Sequence[str] | None = None,
    degrees: Sequence[int] | None = None,
    granularity: str = "layer",
    tied: bool = False,
) -> tuple[ExpansionConfig, ...]:
    """The default expansions of these bases; with degrees, every basis at every degree.

    Raises:
        OrthoFxError: an unknown basis or granularity, a degree that a basis does not have, or `tied` without Fourier.
    """
    if degrees:
        chosen = [ExpansionConfig(basis, degree) for basis in bases or BASES for degree in degrees]
    else:
        wanted = [*BASES] if bases is None else [ExpansionConfig(basis).basis for basis in bases]
        chosen = [expansion for expansion in DEFAULT_EXPANSIONS if expansion.basis in wanted]
        measured = {expansion.basis for expansion in chosen}
        chosen += [ExpansionConfig(basis) for basis in wanted if basis not in measured]
    if tied and not any(basis_named(expansion.basis).tieable for expansion in chosen):
        raise OrthoFxError(f"tied is for the {what_ties()}, and the bases are {', '.join(bases or ())}")
    return tuple(
        dict.fromkeys(
            replace(expansion, granularity=granularity, tied=tied and basis_named(expansion.basis).tieable)
            for expansion in chosen
        )
    )


def _take_turns(
    measured: Sequence[_Measured], config: BenchConfig, timer: _Timer, progress: Callable[[str], None]
) -> None:
    reference = measured[0]
    assert config.rounds is not None
    order = random.Random(0)
    for number in range(config.rounds):
        progress(f"round {number + 1} of {config.rounds}")
        for m in order.sample(measured, len(measured)):
            if all(number < rounds or m.total(0) <= times * reference.total(0) for times, rounds in _SLOW_ROUNDS):
                m.run(timer)


class _Measured:
    """A candidate during the measurement, with the seconds of each phase in each round."""

    def __init__(self, candidate: Candidate, result: Measurement) -> None:
        self.candidate, self.result = candidate, result
        self.rounds: list[dict[str, float]] = []
        self.faults: list[int] = []

    def total(self, number: int) -> float:
        return sum(self.rounds[number].values())

    def prepare(self, timer: _Timer, *, settle: bool) -> None:
        """Compiles, counts kernels and memory, and warms up: until page faults settle, if `settle`."""
        try:
            with generated_code() as codes:
                self.run(timer)
            if self.candidate.compiled:
                self.result.kernels = count_kernels(codes)
            self.result.peak_bytes, self.result.saved_bytes = memory(self.candidate)
            for count in range(1, _LONGEST_WARM_UP + 1):
                self.run(timer)
                settled = not (settle and self.faults and self.faults[-1] > _SETTLED_FAULTS)
                if (count >= _WARM_UP and settled) or self.total(-1) > _LONG:
                    break
        except Exception as error:
            if self.candidate.kind != "peer":
                raise
            self.result.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        self.rounds.clear()
        self.faults.clear()

    def run(self, timer: _Timer) -> None:
        faults, seconds, value = page_faults(), {}, None
        for name, phase in self.candidate.phases.items():
            value, seconds[name] = timer(phase, value)
        self.rounds.append(seconds)
        if faults is not None:
            self.faults.append((page_faults() or 0) - faults)

    def summarise(self, measured: Sequence[_Measured]) -> None:
        reference = measured[0]
        floor = next((m for m in measured if m.candidate.kind == "floor"), None)
        for phase in [*self.candidate.phases, "total"]:
            own, others = self._times(phase), reference._times(phase)
            self.result.seconds[phase] = statistics.median(own)
            # A slow candidate skips the last rounds, so the shorter list has the first ones.
            self.result.ratios[phase] = statistics.median(a / b for a, b in zip(own, others, strict=False))
        totals = self._times("total")
        others = reference._times("total")
        self.result.ratio_of_medians = statistics.median(totals) / statistics.median(others)
        self.result.ratio_of_fastest = min(totals) / min(others)
        if floor is not None:
            pairs = zip(totals, floor._times("total"), strict=False)
            self.result.floor_share = statistics.median(b / a for a, b in pairs)
        self.result.rounds = len(self.rounds)
        self.result.page_faults = statistics.median(self.faults) if self.faults else None

    def _times(self, phase: str) -> list[float]:
        return [sum(times.values()) if phase == "total" else times[phase] for times in self.rounds]


_Timer = Callable[[Callable[[Any], Any], Any], tuple[Any, float]]


def _timer(config: BenchConfig) -> _Timer:
    """A function that calls a phase with the result of the phase before, and returns its result and its seconds."""
    if config.device_type == "cpu":
        return _wall_clock(lambda: None)
    if config.trains:
        return _wall_clock(lambda: torch.cuda.synchronize(config.device))
    # Larger than the L2 cache of any GPU so far.
    scratch = torch.empty(256 * 2**20, dtype=torch.int8, device=config.device)

    def timed(phase: Callable[[Any], Any], value: Any) -> tuple[Any, float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # This takes about two milliseconds, in which Python queues the whole phase. So only the GPU is timed.
        for _ in range(32):
            scratch.zero_()
        start.record()
        result = phase(value)
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end) / 1e3

    return timed


def _wall_clock(synchronize: Callable[[], None]) -> _Timer:
    def timed(phase: Callable[[Any], Any], value: Any) -> tuple[Any, float]:
        synchronize()
        start = time.perf_counter()
        result = phase(value)
        synchronize()
        return result, time.perf_counter() - start

    return timed


@contextlib.contextmanager
def _threads(config: BenchConfig) -> Iterator[None]:
    before = torch.get_num_threads()
    # Generated C++ contains the number of threads at compile time.
    torch.set_num_threads(config.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def memory(candidate: Candidate) -> tuple[int, int | None]:
    """Peak bytes of one call of all phases, and the bytes saved between the phases, without the first phase's result.

    On a CPU they come from the profiler's record of every allocation and release, on CUDA from the allocator.
    """
    live = peak = 0
    saved: int | None = None
    value: Any = None
    for number, phase in enumerate(candidate.phases.values()):
        if number == 1:
            saved = live - value.untyped_storage().nbytes()
        if candidate.device_type == "cuda":
            torch.cuda.synchronize(candidate.device)
            torch.cuda.reset_peak_memory_stats(candidate.device)
            before = torch.cuda.memory_allocated(candidate.device)
            value = phase(value)
            torch.cuda.synchronize(candidate.device)
            peak = max(peak, live + torch.cuda.max_memory_allocated(candidate.device) - before)
            live += torch.cuda.memory_allocated(candidate.device) - before
        else:
            value, sizes = _allocations(phase, value)
            for size in sizes:
                live += size
                peak = max(peak, live)
    return peak, saved


def _allocations(phase: Callable[[Any], Any], value: Any) -> tuple[Any, list[int]]:
    """The result of a phase, and the bytes of each allocation on the CPU, in order; a release has negative bytes."""
    # Without this the profiler writes to stderr when it starts and stops. It reads the variable at its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = phase(value)
    kineto = profile.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def compile_seconds(expansion: ExpansionConfig | None, config: BenchConfig, blocks: int = 12) -> float:
    """The seconds of the first forward and backward of a compiled model, with cold caches; None means GELU.

    The model is a stack of residual blocks, each a normalisation and an MLP of width 64, so small that its running time
    is negligible. All caches start empty, except for what any compile needs: another function is compiled first, which
    imports the compiler's modules and precompiles its C++ headers.
    """
    with _threads(config), torch_private.load(torch_private.TOOLS).fresh_cache():
        torch.compiler.reset()
        x = torch.ones(8, device=config.device, requires_grad=True)
        torch.compile(lambda x: torch.sin(x).sum())(x).backward()
        run = compilation_subject(expansion, config, blocks)
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    torch.compiler.reset()
    return seconds


def compile_times(
    config: BenchConfig, blocks: int = 12, progress: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """`compile_seconds` of GELU and of every expansion of a config, by name, GELU first.

    Each is the lowest of two, measured in turns: whatever else a machine does can only make a compilation longer.
    """
    seconds: dict[str, float] = {}
    for _ in range(2):
        for name, expansion in {"gelu": None, **{str(e): e for e in config.expansions}}.items():
            progress(f"{name}: compiles {blocks} blocks")
            seconds[name] = min(compile_seconds(expansion, config, blocks), seconds.get(name, math.inf))
    return seconds
