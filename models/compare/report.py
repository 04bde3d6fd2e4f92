"""The report of `ortho_fx.models.compare`: the runs of a comparison, their results, and the tables."""

from __future__ import annotations

import csv
import io
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ortho_fx import tables
from ortho_fx.errors import OrthoFxError
from ortho_fx.models.compare.costs import SAME, StepCost, equal_time_steps
from ortho_fx.models.compare.statistics import Difference, Measured, difference, spread
from ortho_fx.models.compare.tuning import Trial, at_the_edge, best

VERSION = 2
LOSS, ACCURACY, TRAINING = "validation_loss", "accuracy", "training_loss"


@dataclass
class ComparedRun:
    """One run of a comparison.

    Args:
        activation, seed: of the run.
        directory: name of its directory, inside that of the comparison.
        parameters, expansion_parameters: how many numbers the model learns, and how many of them are in expansions.
        validations: by step, "validation_loss" in nats and, for images, "accuracy" from 0 to 1.
        step_seconds: median over its steps; the machine may have done other work meanwhile.
        diverged: why it ended before its last step; None if it did not.
        steps: of the whole run, at whose end its learning rate is lowest.
        lr, expansion_lr: peak learning rates; None for an expansion_lr like lr, and in files of version 1.
        training_loss: mean over the last twentieth of its steps, in nats; None if it diverged, and in older files.
        hardware, torch: the processor or GPU on which it ended, and the release of PyTorch; None in older files.
    """

    activation: str
    seed: int
    directory: str
    parameters: int
    expansion_parameters: int
    validations: dict[int, dict[str, float]]
    step_seconds: float | None = None
    diverged: str | None = None
    steps: int = 0
    lr: float | None = None
    expansion_lr: float | None = None
    training_loss: float | None = None
    hardware: str | None = None
    torch: str | None = None

    @property
    def last(self) -> dict[str, float]:
        """The last validation of a run that ended, with its "training_loss" if that is known."""
        training = {} if self.training_loss is None else {TRAINING: self.training_loss}
        return {**self.validations[self.steps], **training}


@dataclass
class Facts:
    """What is known of an activation before its first run.

    Args:
        parameters: how many numbers the model learns.
        same_weights: whether it starts from the reference's very weights, all but those of its activations.
    """

    parameters: int
    same_weights: bool


@dataclass
class Outcome:
    """The results of one activation.

    Args:
        at_equal_steps: the last validation of each finished run of the common number of steps, by seed.
        at_equal_time: that of the runs whose steps take the time of the reference's run, by seed.
        equal_time_steps: the steps of these runs; None if time was not measured.
        at_equal_parameters: `at_equal_steps` if the model learns as many numbers as the reference, within 1 %.
        more_parameters: by what share it learns more numbers than the reference; None if that is not known.
        time_ratio, memory_ratio: of a step, divided by the reference's.
        diverged: the runs that diverged.
    """

    activation: str
    at_equal_steps: dict[int, dict[str, float]]
    at_equal_time: dict[int, dict[str, float]]
    equal_time_steps: int | None
    at_equal_parameters: dict[int, dict[str, float]]
    more_parameters: float | None
    time_ratio: float | None
    memory_ratio: float | None
    diverged: list[ComparedRun]


@dataclass
class Comparison:
    """Runs that differ only in the activation, its settings and the seed. Prints as tables.

    Args:
        settings: the settings that all have in common, by the names of `TrainConfig`, with the name of the data.
        reference: the activation that the others are compared with.
        activations: all of them, the reference first.
        environment: date, hardware and versions.
        runs: those that are done, in the order in which they ended.
        costs: of each activation's training step; empty if time was not measured.
        trials: of learning rates, in the order in which they ended.
        facts: of each activation.
    """

    settings: dict[str, Any]
    reference: str
    activations: list[str]
    environment: dict[str, Any]
    runs: list[ComparedRun] = field(default_factory=list)
    costs: dict[str, StepCost] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict)

    def find(self, activation: str, seed: int, steps: int) -> ComparedRun | None:
        wanted = (activation, seed, steps)
        return next((run for run in self.runs if (run.activation, run.seed, run.steps) == wanted), None)

    def trials_of(self, activation: str) -> list[Trial]:
        """The trials of an activation in order of their numbers."""
        return sorted((t for t in self.trials if t.activation == activation), key=lambda trial: trial.number)

    @property
    def steps(self) -> int:
        """The steps of a run, but for those of equal time."""
        return self.settings["steps"]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def time_ratio(self, activation: str) -> float | None:
        """Time of a training step, divided by the reference's; None if one of them was not measured."""
        own, reference = self.costs.get(activation), self.costs.get(self.reference)
        return None if own is None or reference is None else own.ratio / reference.ratio

    def equal_time_steps(self, activation: str) -> int | None:
        """The steps in the time of the reference's run; None if time was not measured."""
        ratio = self.time_ratio(activation)
        return None if ratio is None else equal_time_steps(self.steps, ratio)

    def outcome(self, activation: str) -> Outcome:
        """The results of an activation, at equal steps, time and parameters."""
        own, reference = self.costs.get(activation), self.costs.get(self.reference)
        memory = None if own is None or reference is None else own.peak_bytes / reference.peak_bytes
        facts, others = self.facts.get(activation), self.facts.get(self.reference)
        more = None if facts is None or others is None else facts.parameters / others.parameters - 1
        at_equal_steps = self._finished(activation, self.steps)
        ending = self.equal_time_steps(activation)
        return Outcome(
            activation,
            at_equal_steps=at_equal_steps,
            at_equal_time={} if ending is None else self._finished(activation, ending),
            equal_time_steps=ending,
            at_equal_parameters=at_equal_steps if more is not None and abs(more) <= SAME else {},
            more_parameters=more,
            time_ratio=self.time_ratio(activation),
            memory_ratio=memory,
            diverged=[run for run in self.runs if run.activation == activation and run.diverged is not None],
        )

    def _finished(self, activation: str, steps: int) -> dict[int, dict[str, float]]:
        runs = [run for run in self.runs if (run.activation, run.steps) == (activation, steps)]
        return {run.seed: run.last for run in runs if run.diverged is None}

    def lowest(self) -> str | None:
        """The activation with the lowest mean loss at equal time, or at equal steps if time was not measured.

        Only activations that finished as many seeds as any other count; None if that leaves fewer than two.
        """
        ended = {name: self._in_time(self.outcome(name)) for name in self.activations}
        most = max(map(len, ended.values()))
        losses = {name: [one[LOSS] for one in own.values()] for name, own in ended.items() if own and len(own) == most}
        return min(losses, key=lambda name: statistics.fmean(losses[name])) if len(losses) > 1 else None

    @property
    def _of_ones_own(self) -> bool:
        """Whether a factory of one's own made the model, the data and the loss."""
        return self.settings["size"] == "custom"

    @property
    def loss_unit(self) -> str | None:
        """Nats, but for a loss of one's own."""
        return None if self._of_ones_own else "nats"

    @property
    def loss_digits(self) -> int:
        """Digits behind the point that losses are written with: 4, or as many as the smallest loss needs for three."""
        losses = [run.last[LOSS] for run in self.runs if run.diverged is None]
        losses += [trial.loss for trial in self.trials if trial.loss is not None]
        return digits_for(min(filter(None, map(abs, losses)), default=1.0), 4)

    def _in_time(self, outcome: Outcome) -> Measured:
        return outcome.at_equal_time if self.costs else outcome.at_equal_steps

    def report(self, *, markdown: bool = False) -> str:
        """The tables as aligned text or as Markdown."""
        parts = [_wrapped(f"**{self._title()}**" if markdown else self._title())]
        for heading, header, rows in self._tables():
            if markdown:
                named = [[header[0] or " ", *header[1:]], *([f"`{row[0]}`", *row[1:]] for row in rows)]
                parts.append(f"{heading}\n\n{tables.markdown(named, 'lr')}")
            else:
                parts.append(f"{heading}\n{tables.table([header, *rows], 'lr')}")
        parts.append("\n".join(_wrapped(f"- {note}" if markdown else note) for note in self._notes()))
        return "\n\n".join(parts)

    def latex(self) -> str:
        """The tables in LaTeX, each after a comment with its heading."""
        return "\n\n".join(
            f"% {heading}\n{tables.latex([header, *rows], 'lr')}" for heading, header, rows in self._tables()
        )

    def csv(self) -> str:
        """The results unrounded, with a line for each activation, kind of equality and measure."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(_COLUMNS)
        outcomes = [self.outcome(activation) for activation in self.activations]
        for outcome in outcomes:
            run = next((run for run in self.runs if run.activation == outcome.activation), None)
            facts = self.facts.get(outcome.activation)
            rates = (None, None) if run is None else (run.lr, run.expansion_lr)
            for equal, steps, values, reference in self._equalities(outcome, outcomes[0]):
                for measure in (LOSS, ACCURACY, TRAINING):
                    numbers = [measured[measure] for measured in values.values() if measure in measured]
                    if not numbers:
                        continue
                    beside = self._beside(outcome, values, reference, measure)
                    lines.writerow(
                        [
                            outcome.activation,
                            equal,
                            measure,
                            steps,
                            None if facts is None else facts.parameters,
                            outcome.time_ratio,
                            outcome.memory_ratio,
                            *rates,
                            len(numbers),
                            *spread(numbers),
                            *_plain(beside),
                        ]
                    )
        return text.getvalue()

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, unrounded."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The comparison with these values, as `to_dict` or its JSON has them; also those of version 1.

        Raises:
            OrthoFxError: values of another version or another form.
        """
        values = dict(values)
        version = values.pop("version", None)
        if version not in (1, VERSION):
            raise OrthoFxError(f"comparison has version {version!r}; this release reads versions 1 and {VERSION}")
        try:
            if version == 1:
                values = _of_version_1(values)
            runs = [ComparedRun(**run) for run in values.pop("runs")]
            for run in runs:
                run.validations = {int(step): measured for step, measured in run.validations.items()}
            costs = {name: StepCost(**cost) for name, cost in values.pop("costs").items()}
            trials = [Trial(**trial) for trial in values.pop("trials")]
            facts = {name: Facts(**known) for name, known in values.pop("facts").items()}
            return cls(runs=runs, costs=costs, trials=trials, facts=facts, **values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OrthoFxError(f"not a comparison: {type(error).__name__}: {error}") from None

    def _title(self) -> str:
        settings = self.settings
        hardware, releases = self._places()
        facts = self.facts.get(self.reference)
        seeds = len(self.seeds)
        parts = [
            settings["model"] if self._of_ones_own else f"{settings['model']} {settings['size']}",
            "" if facts is None else f"{facts.parameters:,} parameters",
            "" if self._of_ones_own else settings["data"],
            f"{settings['steps']:,} steps",
            f"batch size {settings['batch_size']}",
            f"{seeds} seed{'' if seeds == 1 else 's'}",
            f"{settings['dtype']} on {settings['device']} ({' and '.join(hardware)})",
            f"torch {' and '.join(releases)}",
            self.environment["date"],
        ]
        return ", ".join(part for part in parts if part)

    def _places(self) -> tuple[list[str], list[str]]:
        """The distinct hardware and the distinct releases of PyTorch that the runs were trained on."""
        own = (self.environment["hardware"], self.environment["versions"]["torch"])
        places = [(run.hardware or own[0], run.torch or own[1]) for run in self.runs] or [own]
        hardware, releases = (list(dict.fromkeys(names)) for names in zip(*places, strict=True))
        return hardware, releases

    def _equalities(self, own: Outcome, reference: Outcome) -> list[tuple[str, int | None, Measured, Measured]]:
        """The kinds of equality: name, steps, and the values of an activation and of the reference.

        All activations have the same; one whose step is not measured has no steps and no values at equal time.
        """
        found: list[tuple[str, int | None, Measured, Measured]] = [
            ("steps", self.steps, own.at_equal_steps, reference.at_equal_steps)
        ]
        if self.costs:
            found.append(("time", own.equal_time_steps, own.at_equal_time, reference.at_equal_steps))
        found.append(("parameters", self.steps, own.at_equal_parameters, reference.at_equal_steps))
        return found

    def _beside(self, own: Outcome, values: Measured, reference: Measured, measure: str) -> Difference | None:
        if own.activation == self.reference:
            return None
        return difference(values, reference, measure, larger_is_better=measure == ACCURACY)

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Heading, header and rows of each table."""
        outcomes = [self.outcome(activation) for activation in self.activations]
        images = any(ACCURACY in values for outcome in outcomes for values in outcome.at_equal_steps.values())
        found = []
        for measure, what, scale, digits in (
            (LOSS, "validation loss", 1, self.loss_digits),
            (ACCURACY, "accuracy in points", 100, 2),
        ):
            if measure == ACCURACY and not images:
                continue
            rows = [
                [
                    outcome.activation,
                    *(
                        _with_interval(self._beside(outcome, values, reference, measure), scale, digits)
                        for _, _, values, reference in self._equalities(outcome, outcomes[0])
                    ),
                ]
                for outcome in outcomes
            ]
            names = [equal for equal, *_ in self._equalities(outcomes[0], outcomes[0])]
            heading = f"Difference to {self.reference}, {what}, with the 95 % interval of Student's t:"
            found.append((heading, ["", *(f"at equal {name}" for name in names)], rows))
        if (lowest := self.lowest()) is not None and len(self.activations) > 2:
            own, equal = self._in_time(self.outcome(lowest)), "time" if self.costs else "steps"
            others = [outcome for outcome in outcomes if outcome.activation != lowest]
            less = [(other.activation, difference(own, self._in_time(other), LOSS, False)) for other in others]
            found.append(
                (
                    f"The lowest at equal {equal} is {lowest}. Its validation loss there minus that of each other:",
                    ["", "difference", "95 % (t)", "95 % (bootstrap)", "better"],
                    [[name, *_difference(beside, self.loss_digits)] for name, beside in less],
                )
            )
        measures = ["validation loss", "difference", "95 % (t)", "95 % (bootstrap)", "better"]
        measures += ["training loss"] if self._knows_training() else []
        measures += ["accuracy %", "difference"] if images else []
        header = ["", "parameters", "of them in expansions", *measures, "finished", "diverged"]
        rows = [self._at_equal_steps(outcome, outcomes[0], images) for outcome in outcomes]
        found.append((f"At equal steps, after {self.steps:,}:", header, rows))
        if self.costs:
            header = ["", "ms a step", "in training", "time", "peak memory", "steps", *measures, "diverged"]
            rows = [self._at_equal_time(outcome, outcomes[0], images) for outcome in outcomes]
            found.append((f"At equal time, that of {self.steps:,} steps of {self.reference}:", header, rows))
        if self.trials:
            header = ["", "trials", "lr", "expansion_lr", "its loss", "loss at the first rates", "at the edge"]
            heading = (
                f"Learning rates, chosen after {self.settings['tune_steps']:,} steps of a seed that is not reported:"
            )
            found.append((heading, header, [self._rates(activation) for activation in self.activations]))
        return found

    def _knows_training(self) -> bool:
        return any(run.training_loss is not None for run in self.runs)

    def _at_equal_steps(self, outcome: Outcome, reference: Outcome, images: bool) -> list[str]:
        run = next((run for run in self.runs if run.activation == outcome.activation), None)
        facts = self.facts.get(outcome.activation)
        more = "" if not outcome.more_parameters else f" ({100 * outcome.more_parameters:+.2f} %)"
        return [
            outcome.activation,
            "-" if facts is None else f"{facts.parameters:,}{more}",
            "-" if run is None else f"{run.expansion_parameters:,}",
            *self._measures(outcome, outcome.at_equal_steps, reference.at_equal_steps, images),
            str(len(outcome.at_equal_steps)),
            str(sum(run.steps == self.steps for run in outcome.diverged)),
        ]

    def _at_equal_time(self, outcome: Outcome, reference: Outcome, images: bool) -> list[str]:
        cost = self.costs.get(outcome.activation)
        runs = [run for run in self.runs if run.activation == outcome.activation]
        trained = [run.step_seconds for run in runs if run.step_seconds is not None]
        return [
            outcome.activation,
            "-" if cost is None else f"{1e3 * cost.seconds:.4g}",
            f"{1e3 * statistics.median(trained):.4g}" if trained else "-",
            "-" if outcome.time_ratio is None else f"{outcome.time_ratio:.3f}",
            "-" if outcome.memory_ratio is None else f"{outcome.memory_ratio:.3f}",
            "-" if outcome.equal_time_steps is None else f"{outcome.equal_time_steps:,}",
            *self._measures(outcome, outcome.at_equal_time, reference.at_equal_steps, images),
            str(sum(run.steps == outcome.equal_time_steps for run in outcome.diverged)),
        ]

    def _measures(self, own: Outcome, values: Measured, reference: Measured, images: bool) -> list[str]:
        digits = self.loss_digits
        cells = [_spread(values, LOSS, 1, digits), *_difference(self._beside(own, values, reference, LOSS), digits)]
        if self._knows_training():
            cells.append(_spread(values, TRAINING, 1, digits))
        if images:
            cells.append(_spread(values, ACCURACY, 100, 2))
            cells.append(_with_interval(self._beside(own, values, reference, ACCURACY), 100, 2))
        return cells

    def _rates(self, activation: str) -> list[str]:
        trials = self.trials_of(activation)
        chosen = best(trials)
        if not trials or chosen is None:
            return [activation, str(len(trials)), *["-"] * 5]
        coefficients = "-" if chosen.expansion_lr is None else f"{chosen.expansion_lr:.3g}"
        first = trials[0].loss
        edge = ", ".join(at_the_edge(trials)) or "-"
        losses = ["diverged" if loss is None else f"{loss:.{self.loss_digits}f}" for loss in (chosen.loss, first)]
        return [activation, str(len(trials)), f"{chosen.lr:.3g}", coefficients, *losses, edge]

    def _notes(self) -> list[str]:
        notes = [
            "± is the sample standard deviation over seeds. A difference is the mean, over the seeds that both "
            f"finished, of the value less that of {self.reference} with the same seed. Its intervals are those of "
            "Student's t and of the bootstrap over seeds, which is too narrow for few seeds."
        ]
        others = [name for name in self.activations if name in self.facts and not self.facts[name].same_weights]
        if others:
            notes.append(
                "Runs of one seed see the same batches. They start from the same weights, but for "
                f"{', '.join(others)}, whose weights have other shapes and are drawn anew."
            )
        elif self.facts:
            notes.append("Runs of one seed start from the same weights and see the same batches.")
        if any(len(names) > 1 for names in self._places()):
            notes.append("Not all runs were trained on one machine and release: compare.json names those of each.")
        unequal = [name for name in self.activations if abs(self.outcome(name).more_parameters or 0) > SAME]
        if unequal:
            notes.append(f"Other than {self.reference} in parameters by more than 1 %: {', '.join(unequal)}.")
        if self._knows_training():
            notes.append('"training loss" is the mean over the last twentieth of the steps, while the model trains.')
        if self.settings["warmup"] > self.steps:
            notes.append(
                f"Runs of {self.steps:,} steps end within the warmup of {self.settings['warmup']:,}: no learning rate "
                "reaches its peak, and none comes down. Their order says little about longer runs."
            )
        if self.costs:
            places = "; ".join(dict.fromkeys(cost.measured for cost in self.costs.values()))
            notes += [
                f'"time" and "peak memory" are ratios to {self.reference} of a training step, measured in turns in one '
                f"process ({places}), medians; memory is what a step allocates beyond weights, optimizer state and "
                'inputs. "in training" is the median of the runs\' own steps, whatever else the machine did.',
                "At equal time an activation has a run of its own, whose schedule ends with the time of the reference's"
                " run. If that is within 1 % of the same number of steps, it is the same run.",
            ]
        if self.lowest() is not None and len(self.activations) > 2:
            notes.append(
                "The lowest is chosen by the same runs as its differences are taken from, so they are a little too "
                "large where others are close."
            )
        if self.trials:
            notes.append(
                "Every activation has the same number of trials around its first rates, on the same batches; they are "
                "read on the validation data. A best rate at the edge of what was tried may not be the best."
            )
        notes += [
            f"{r.activation} diverged with seed {r.seed} in {r.steps:,} steps: {r.diverged}"
            for r in self.runs
            if r.diverged is not None
        ]
        return notes


_COLUMNS = [
    "activation",
    "equal",
    "measure",
    "steps",
    "parameters",
    "time_ratio",
    "memory_ratio",
    "lr",
    "expansion_lr",
    "seeds",
    "mean",
    "std",
    "difference",
    "t_low",
    "t_high",
    "bootstrap_low",
    "bootstrap_high",
    "better",
    "pairs",
]


def _plain(beside: Difference | None) -> list[float | None]:
    if beside is None:
        return [None] * 7
    intervals = [*(beside.t or (None, None)), *(beside.bootstrap or (None, None))]
    return [beside.mean, *intervals, beside.better, beside.pairs]


def _of_version_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of version 1 as those of today: it had no trials and no runs of equal time."""
    values = dict(values)
    environment = values.pop("costs_environment")
    count = environment.get("threads")
    threads = "" if count is None else f"{count} thread{'' if count == 1 else 's'}"
    places = ", ".join(filter(None, [environment.get("hardware"), threads, environment.get("date")]))
    steps = values["settings"]["steps"]
    runs = [{**run, "steps": steps} for run in values.pop("runs")]
    costs = {name: {**cost, "measured": places} for name, cost in values.pop("costs").items()}
    facts = {run["activation"]: {"parameters": run["parameters"], "same_weights": True} for run in runs}
    return {**values, "runs": runs, "costs": costs, "trials": [], "facts": facts}


def digits_for(smallest: float, least: int) -> int:
    """How many digits behind the point show three significant ones of a positive number, or `least` if that is more."""
    return max(least, 2 - math.floor(math.log10(smallest)))


def _spread(values: Measured, measure: str, scale: float, digits: int) -> str:
    numbers = [scale * measured[measure] for measured in values.values() if measure in measured]
    if not numbers:
        return "-"
    mean, std = spread(numbers)
    return f"{mean:.{digits}f} ± {'-' if std is None else format(std, f'.{digits}f')}"


def _difference(beside: Difference | None, digits: int) -> list[str]:
    """The cells of a difference of losses: mean, both intervals, and on how many seeds it is better."""
    if beside is None:
        return ["-"] * 4
    better = f"{beside.better} of {beside.pairs}"
    intervals = (_interval(bounds, 1, digits) for bounds in (beside.t, beside.bootstrap))
    return [f"{beside.mean:+.{digits}f}", *intervals, better]


def _interval(interval: Sequence[float] | None, scale: float, digits: int) -> str:
    if interval is None:
        return "-"
    low, high = (f"{scale * bound:+.{digits}f}" for bound in interval)
    return f"{low} to {high}"


def _with_interval(beside: Difference | None, scale: float, digits: int) -> str:
    if beside is None:
        return "-"
    mean = f"{scale * beside.mean:+.{digits}f}"
    return mean if beside.t is None else f"{mean} ({_interval(beside.t, scale, digits)})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, subsequent_indent="  " if text.startswith("- ") else "", break_on_hyphens=False)
