"""`Course`: what one expansion was at several steps of a training."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ortho_fx.activations.expansion import ExpansionActivation


@dataclass
class Course:
    """One expansion over the training.

    Attributes:
        activation: the expansion, for its basis and its form; its own values do not matter.
        steps: the steps at which it was recorded, in their order.
        values: its parameters by name at each of these steps, on the CPU.
        interval: where its inputs lie.
    """

    activation: ExpansionActivation
    steps: list[int] = field(default_factory=list)
    values: list[dict[str, Tensor]] = field(default_factory=list)
    interval: tuple[float, float] = (-4.0, 4.0)

    def at(self, place: int) -> ExpansionActivation:
        """The expansion with the values of one record, in float64."""
        made = copy.deepcopy(self.activation).to("cpu", torch.float64)
        made.load_state_dict({**made.state_dict(), **self.values[place]})
        return made
