"""Shows a run's progress: a bar with loss, rate and time left on a terminal, lines of text elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Shows the steps of one run; a context manager around its loop.

    Args:
        title: the text before the bar.
        steps: the step at which the run ends.
        unit: the unit of `amount` ("tokens", "images").
        shown: whether this process prints; only one of a distributed run does.
    """

    def __init__(self, title: str, steps: int, unit: str, *, shown: bool = True) -> None:
        self.title, self.steps, self.unit, self.shown = title, steps, unit, shown
        self._bar: Any = None
        self._task: Any = None
        self._clock: float | None = None
        self._amount = 0

    def __enter__(self) -> Progress:
        if self.shown and sys.stdout.isatty():
            try:
                from rich import progress
            except ImportError:
                return self
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} {task.fields[unit]}/s"),
                progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task(self.title, total=self.steps, loss=float("nan"), rate=0.0, unit=self.unit)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, amount: int) -> float:
        """Shows a step that processed `amount` and returns the rate. The first step, which compiles, does not count."""
        now = time.perf_counter()
        if self._clock is None:
            self._clock = now
        else:
            self._amount += amount
        rate = self._amount / (now - self._clock) if self._amount else 0.0
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, rate=rate)
        return rate

    def pause(self, since: float) -> None:
        """Leaves the time from `since` until now, as of a validation, out of the rate."""
        if self._clock is not None:
            self._clock += time.perf_counter() - since

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self.shown:
            print(text, flush=True)
