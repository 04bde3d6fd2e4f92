"""The learning rates that `compare --tune N` tries: the same number of trials for every activation.

Trial 0 has the rates of the run. Trial k has lr 4^(2 u_k - 1), so from a quarter to four times the rate, and
coefficients that learn at 2^(8 v_k - 3) times that, from an eighth to 32 times. u and v are the Halton sequences of
bases 2 and 3, which fill the square evenly, so a larger N tries the same rates and more. Every activation tries the
same factors. A rate that an activation sets for itself is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ortho_fx.models.compare.activations import Activation
from ortho_fx.models.recipe import TrainConfig

# Trials have this seed, counted from the first that is reported; so many are never reported.
SEED_OF_TRIALS = 10_000


@dataclass
class Trial:
    """One trial of an activation's learning rates.

    Args:
        activation: its label.
        number: from 0 up.
        lr, expansion_lr: peak learning rates of the weights and of the expansions; None for the same.
        steps: of the trial.
        seed: of its weights and batches; no reported run has it.
        loss: validation loss in nats after the last step; None if the trial diverged, or is still to be trained.
    """

    activation: str
    number: int
    lr: float
    expansion_lr: float | None
    steps: int
    seed: int
    loss: float | None = None

    def rates(self) -> dict[str, float | None]:
        """The rates as settings of a run."""
        return {"lr": self.lr, "expansion_lr": self.expansion_lr}


def trials_of(activation: Activation, config: TrainConfig, count: int, steps: int) -> list[Trial]:
    """The trials of an activation; none if it sets all of its rates itself.

    Args:
        activation: what is tuned.
        config: its run with the first reported seed.
        count: how many trials.
        steps: of each.
    """
    assert config.lr is not None
    own = dict(activation.settings)
    tunes_lr, tunes_expansions = "lr" not in own, activation.learns and "expansion_lr" not in own
    if not (tunes_lr or tunes_expansions):
        return []
    found = []
    for number in range(count):
        lr, expansion_lr = config.lr, config.expansion_lr
        if number and tunes_lr:
            lr *= 4 ** (2 * _halton(number + 1, 2) - 1)
        if number and tunes_expansions:
            expansion_lr = lr * 2 ** (8 * _halton(number, 3) - 3)
        found.append(Trial(activation.label, number, lr, expansion_lr, steps, config.seed + SEED_OF_TRIALS))
    return found


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the lowest loss, and of equal ones the first; None without a trial that did not diverge."""
    ended = [trial for trial in trials if trial.loss is not None]
    return min(ended, key=lambda trial: (trial.loss, trial.number), default=None)


def at_the_edge(trials: Sequence[Trial]) -> list[str]:
    """The rates of the best trial that are the lowest or the highest of all that were tried."""
    chosen = best(trials)
    if chosen is None:
        return []
    found = []
    tried = {
        "lr": [trial.lr for trial in trials],
        "expansion_lr": [(trial.expansion_lr or trial.lr) / trial.lr for trial in trials],
    }
    for name, values in tried.items():
        value = values[trials.index(chosen)]
        if len(set(values)) > 1 and value in (min(values), max(values)):
            found.append(name)
    return found


def _halton(index: int, base: int) -> float:
    """The digits of an index in a base, mirrored behind the point."""
    value, place = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        place /= base
        value += digit * place
    return value
