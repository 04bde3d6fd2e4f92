"""`Recorder`: keeps what the expansions of a model were while it trained, and draws it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ortho_fx.activations.course import Course
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.arguments import checked_model, is_integer
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.vocabulary.sites import plain_name
from ortho_fx.plots import plot_courses, save
from ortho_fx.rewriting.sources import unwrapped
from ortho_fx.sharded import whole


class Recorder:
    """Records the expansions of a model in any training loop: call `step` after each step, and `plot` at the end.

    A record is a copy of the parameters on the CPU. With sharded parameters (FSDP2) every process has to make the
    recorder and to call `step`, which communicate.

    Args:
        model: a rewritten model, also wrapped or compiled. What its expansions are now is recorded at once.
        every: how many steps lie between two records.
        first: how many steps are done already.

    Attributes:
        courses: what was recorded of each site.

    Raises:
        OrthoFxError: a model without expansions, or an argument that is no integer above zero.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> report = rewrite_(model, "hermite3")
        >>> recorder = Recorder(model, every=10)
        >>> for step in range(30):
        ...     recorder.step()  # after the optimizer's
        >>> recorder.courses["1"].steps
        [0, 10, 20, 30]
        >>> recorder.plot("expansions.png")  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, every: int = 1, first: int = 0) -> None:
        checked_model(model)
        if not is_integer(every) or every < 1:
            raise OrthoFxError(f"every must be an integer above zero; got {every!r}")
        self.every = every
        self.courses = {
            plain_name(name): Course(module)
            for name, module in unwrapped(model).named_modules()
            if isinstance(module, ExpansionActivation)
        }
        if not self.courses:
            raise OrthoFxError(f"{type(model).__name__} holds no expansion to record: call rewrite_ first")
        self._last = first
        self._record()

    def step(self, step: int | None = None) -> None:
        """Records the expansions if it is time.

        Args:
            step: how many steps are done (None: one more than at the last call).
        """
        self._last = self._last + 1 if step is None else step
        if self._last % self.every == 0:
            self._record()

    def figure(self, interval: tuple[float, float] | None = None) -> Any:
        """A figure of matplotlib with a row for each site: its parameters over the steps, and its function at some.

        Of more than eight sites, eight are drawn that are evenly spread. An expansion per channel is drawn as the mean
        over the channels.

        Args:
            interval: the inputs for which the functions are drawn (None: from -4 to 4).

        Raises:
            OrthoFxError: no matplotlib.
        """
        if interval is not None:
            for course in self.courses.values():
                course.interval = interval
        return plot_courses(self.courses)

    def plot(self, path: str | Path, interval: tuple[float, float] | None = None) -> None:
        """Writes `figure` to a file; the ending decides the format.

        Raises:
            OrthoFxError: the file cannot be written, or no matplotlib.
        """
        save(self.figure(interval), path)

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, for a checkpoint."""
        return {
            "last": self._last,
            "courses": {
                name: {"steps": list(course.steps), "values": list(course.values)}
                for name, course in self.courses.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what was recorded before a resumption, up to the checkpoint's step.

        Raises:
            OrthoFxError: a state of another model's recorder.
        """
        if state["courses"].keys() != self.courses.keys():
            told = ", ".join(sorted(state["courses"].keys() ^ self.courses.keys()))
            raise OrthoFxError(f"the state is of a recorder of other sites: {told}")
        self._last = state["last"]
        for name, held in state["courses"].items():
            self.courses[name].steps[:], self.courses[name].values[:] = held["steps"], held["values"]

    def _record(self) -> None:
        for course in self.courses.values():
            values = {key: whole(value).to("cpu", copy=True) for key, value in course.activation.named_parameters()}
            if course.steps and course.steps[-1] >= self._last:  # a step that is done again
                keep = [place for place, step in enumerate(course.steps) if step < self._last]
                course.values[:] = [course.values[place] for place in keep]
                course.steps[:] = [course.steps[place] for place in keep]
            course.steps.append(self._last)
            course.values.append(values)
