"""Shows a run's progress: a line with a bar, loss, rate and time left on a terminal, lines of text elsewhere.

The line never wraps. On a narrow terminal it leaves out, in this order, the title, the rate, the bar and the time left.
The number of steps and the state stay: "compiling 0:12", "loss 1.2345" or "validating 3/40".
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from ortho_fx.files import reason

_SHORTEST_BAR, _LONGEST_BAR = 8, 40


class Progress:
    """Shows the steps of one run; a context manager around its loop.

    Args:
        title: the text at the start of the line.
        steps: the step at which the run ends.
        unit: the unit of `amount` ("tokens", "images").
        first: the number of steps that are done already.
        compiles: whether the first step compiles.
        shown: whether this process prints; only one of a distributed run does.

    Attributes:
        lost: why no more lines can be printed, as after `| head`; None while they can.
    """

    def __init__(
        self, title: str, steps: int, unit: str, *, first: int = 0, compiles: bool = False, shown: bool = True
    ) -> None:
        self.title, self.steps, self.unit, self.shown = title, steps, unit, shown
        self.compiles, self._first, self._done = compiles, first, first
        self.lost: str | None = None
        self._live: Any = None
        self._started = time.perf_counter()
        # The clock of the rate stands still in pauses; the time left counts from the first step, with them.
        self._clock: float | None = None
        self._first_step: tuple[float, int] | None = None
        self._amount = 0
        self._rate = 0.0
        self._loss = self._validating = self._left = ""

    def __enter__(self) -> Progress:
        self._started = time.perf_counter()
        if self.shown and sys.stdout.isatty():
            try:
                from rich.console import Console
                from rich.live import Live
                from rich.text import Text
            except ImportError:
                return self
            console = Console()
            if console.is_dumb_terminal:  # it cannot overwrite a line
                return self

            def shown() -> Text:
                # One column stays free: some terminals wrap a line that fills them.
                marks = "=-" if console.options.ascii_only else "━─"
                return Text(self.bar(console.width - 1, marks), no_wrap=True, overflow="crop")

            self._live = Live(console=console, get_renderable=shown)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, step: int, loss: float, amount: int) -> float:
        """Shows a step that processed `amount` and returns the rate. The first step, which compiles, does not count."""
        now = time.perf_counter()
        if self._clock is None:
            self._clock, self._first_step = now, (now, step)
        else:
            self._amount += amount
        self._rate = self._amount / (now - self._clock) if self._amount else 0.0
        self._done, self._loss = step, f"loss {loss:.4f}"
        since, first = self._first_step or (now, step)
        if step > first:
            self._left = f"{_clock_text((now - since) / (step - first) * (self.steps - step))} left"
        return self._rate

    def validating(self, done: int, batches: int) -> None:
        """Shows that a validation has taken `done` of its batches, until `pause`."""
        self._validating = f"validating {done}/{batches}"

    def pause(self, since: float) -> None:
        """Leaves the time from `since` until now, as of a validation, out of the rate."""
        self._validating = ""
        if self._clock is not None:
            self._clock += time.perf_counter() - since

    def line(self, text: str, *shorter: str) -> None:
        """Prints a line, above the bar if there is one; on a terminal the first of the texts that fits into a line."""
        if self.lost is not None:
            return
        try:
            if self._live is not None:
                console = self._live.console
                fits = (one for one in (text, *shorter) if len(one) <= console.width)
                console.print(next(fits, (text, *shorter)[-1]), highlight=False, markup=False)
            elif self.shown:
                print(text, flush=True)
        except OSError as error:  # an error here would end the run before it has saved
            self.lost = reason(error)

    def bar(self, width: int, marks: str = "━─") -> str:
        """The line that a terminal shows, in at most `width` columns; `marks` draw the done and the open part."""
        started = f"{'compiling' if self.compiles else 'starting'} {_clock_text(time.perf_counter() - self._started)}"
        state = self._validating or self._loss or started
        rate = f"{self._rate:,.0f} {self.unit}/s" if self._rate else ""
        count = f"{self._done}/{self.steps}"
        return fitted(width, self.title, self._done / max(self.steps, 1), count, state, rate, self._left, marks)


def fitted(
    width: int, title: str, share: float, count: str, state: str, rate: str, left: str, marks: str = "━─"
) -> str:
    """The parts that fit into `width` columns, in this order, with a bar of the share after the title."""
    # From what must be seen to what may be left out.
    parts = {
        "count": count,
        "state": state,
        "left": left,
        "bar": marks[0] * _SHORTEST_BAR,
        "rate": rate,
        "title": title,
    }
    kept: list[str] = []
    used = -1
    for name, text in parts.items():
        if text and used + 1 + len(text) > width:
            break
        if text:
            kept.append(name)
            used += 1 + len(text)
    if "bar" in kept:
        length = min(_SHORTEST_BAR + width - used, _LONGEST_BAR)
        filled = round(min(max(share, 0.0), 1.0) * length)
        parts["bar"] = marks[0] * filled + marks[1] * (length - filled)
    order = ("title", "bar", "count", "state", "rate", "left")
    return " ".join(parts[name] for name in order if name in kept) or count[:width]


def _clock_text(seconds: float) -> str:
    """12 s is "0:12", an hour "1:00:00"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
