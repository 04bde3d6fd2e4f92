"""SIGTERM and Ctrl-C: they end a run where its weights are saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from ortho_fx.errors import Terminated


class Signals:
    """Turns SIGTERM into `Terminated`, as Python turns SIGINT into KeyboardInterrupt; a context manager.

    While `delayed` is true, a first signal only sets `asked`, so that the weights that are saved belong to the step
    that is saved. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.asked = self.terminated = self.delayed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python allows signal handlers in its main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again = self.asked
        self.asked = True
        self.terminated = self.terminated or number == signal.SIGTERM
        if number == signal.SIGINT and (again or not self.delayed):
            raise KeyboardInterrupt
        if number == signal.SIGTERM and not self.delayed:
            raise Terminated
