"""The report of `ortho_fx.models.compare`: the runs of a comparison, their results, and the table."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ortho_fx import tables
from ortho_fx.errors import OrthoFxError

VERSION = 1
LOSS, ACCURACY = "validation_loss", "accuracy"
_Measured = Mapping[int, Mapping[str, float]]  # measures by seed


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
    """

    activation: str
    seed: int
    directory: str
    parameters: int
    expansion_parameters: int
    validations: dict[int, dict[str, float]]
    step_seconds: float | None = None
    diverged: str | None = None


@dataclass
class StepCost:
    """A training step of one activation, measured in turns with the others in one process.

    Args:
        seconds: median over the rounds.
        ratio: median over the rounds of the time divided by that of the first activation in the same round.
        peak_bytes: the most memory that the step held at a time, beyond weights, optimizer state and inputs.
        rounds: how many there were.
    """

    seconds: float
    ratio: float
    peak_bytes: int
    rounds: int


@dataclass
class Outcome:
    """The results of one activation.

    Args:
        final: the last validation of each finished run, by seed.
        at_equal_time: the last validation within the time that the reference's steps take, by seed; empty if time was
            not measured or no validation came that early.
        equal_time_step: the step of that validation.
        time_ratio, memory_ratio: of a step, divided by the reference's.
        time_share: time up to `equal_time_step`, divided by the reference's whole time.
        diverged: seeds whose run diverged.
    """

    activation: str
    final: dict[int, dict[str, float]]
    at_equal_time: dict[int, dict[str, float]]
    equal_time_step: int | None
    time_ratio: float | None
    memory_ratio: float | None
    time_share: float | None
    diverged: list[int]


@dataclass
class Difference:
    """A measure of one activation minus that of the reference, over the seeds that both finished.

    Args:
        mean: of the paired differences.
        in_stds: the mean divided by the larger of the two sample standard deviations; None if one of the two has a
            single seed.
        better: number of seeds on which the activation is better than the reference.
        pairs: number of seeds.
    """

    mean: float
    in_stds: float | None
    better: int
    pairs: int


@dataclass
class Comparison:
    """Runs that differ only in the activation, its settings and the seed. Prints as a table.

    Args:
        settings: the settings that all have in common, by the names of `TrainConfig`, with the name of the data.
        reference: the activation that the others are compared with.
        activations: all of them, the reference first.
        environment: date, hardware and versions.
        runs: those that are done, in the order of training.
        costs: of each activation's training step; empty if time was not measured.
        costs_environment: date, hardware and versions of that measurement.
    """

    settings: dict[str, Any]
    reference: str
    activations: list[str]
    environment: dict[str, Any]
    runs: list[ComparedRun] = field(default_factory=list)
    costs: dict[str, StepCost] = field(default_factory=dict)
    costs_environment: dict[str, Any] = field(default_factory=dict)

    def find(self, activation: str, seed: int) -> ComparedRun | None:
        return next((run for run in self.runs if (run.activation, run.seed) == (activation, seed)), None)

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def outcome(self, activation: str) -> Outcome:
        """The results of an activation, at equal steps and at equal time."""
        steps = self.settings["steps"]
        runs = [run for run in self.runs if run.activation == activation]
        finished = [run for run in runs if run.diverged is None]
        own, reference = self.costs.get(activation), self.costs.get(self.reference)
        time_ratio = memory_ratio = step = None
        if own is not None and reference is not None:
            time_ratio = own.ratio / reference.ratio
            memory_ratio = own.peak_bytes / reference.peak_bytes
            step = equal_time_step(sorted({step for run in finished for step in run.validations}), steps, time_ratio)
        return Outcome(
            activation,
            final={run.seed: run.validations[steps] for run in finished},
            at_equal_time={run.seed: run.validations[step] for run in finished if step in run.validations},
            equal_time_step=step,
            time_ratio=time_ratio,
            memory_ratio=memory_ratio,
            time_share=None if step is None or time_ratio is None else step * time_ratio / steps,
            diverged=[run.seed for run in runs if run.diverged is not None],
        )

    def report(self, *, markdown: bool = False) -> str:
        """The table, at equal steps and at equal time, as aligned text or as Markdown."""
        parts = [_wrapped(f"**{self._title()}**" if markdown else self._title())]
        for heading, header, rows in self._tables():
            if markdown:
                named = [[header[0] or " ", *header[1:]], *([f"`{row[0]}`", *row[1:]] for row in rows)]
                parts.append(f"{heading}\n\n{tables.markdown(named, 'lr')}")
            else:
                parts.append(f"{heading}\n{tables.table(tables.without_empty_columns([header, *rows]), 'lr')}")
        parts.append("\n".join(_wrapped(f"- {note}" if markdown else note) for note in self._notes()))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, unrounded."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The comparison with these values, as `to_dict` or its JSON has them.

        Raises:
            OrthoFxError: values of another version or another form.
        """
        values = dict(values)
        version = values.pop("version", None)
        if version != VERSION:
            raise OrthoFxError(f"comparison has version {version!r}; this release reads version {VERSION}")
        try:
            runs = [ComparedRun(**run) for run in values.pop("runs")]
            for run in runs:
                run.validations = {int(step): measured for step, measured in run.validations.items()}
            costs = {name: StepCost(**cost) for name, cost in values.pop("costs").items()}
            return cls(runs=runs, costs=costs, **values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OrthoFxError(f"not a comparison: {type(error).__name__}: {error}") from None

    def _title(self) -> str:
        settings, environment = self.settings, self.environment
        parameters = next((run.parameters for run in self.runs if run.activation == self.reference), None)
        seeds = len(self.seeds)
        parts = [
            f"{settings['model']} {settings['size']}",
            "" if parameters is None else f"{parameters:,} parameters",
            settings["data"],
            f"{settings['steps']:,} steps",
            f"batch size {settings['batch_size']}",
            f"{seeds} seed{'' if seeds == 1 else 's'}",
            f"{settings['dtype']} on {settings['device']} ({environment['hardware']})",
            f"torch {environment['versions']['torch']}",
            environment["date"],
        ]
        return ", ".join(part for part in parts if part)

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Heading, header and rows of two tables: at equal steps and, if time was measured, at equal time."""
        outcomes = [self.outcome(activation) for activation in self.activations]
        images = any(ACCURACY in values for outcome in outcomes for values in outcome.final.values())
        accuracy = ["accuracy %", "difference"] if images else []
        steps, reference = self.settings["steps"], outcomes[0].final
        header = ["", "expansion parameters", "validation loss", "difference", "in stds", "better", *accuracy]
        rows = [self._at_equal_steps(outcome, reference, images) for outcome in outcomes]
        found = [(f"At equal steps, after {steps:,}:", [*header, "finished", "diverged"], rows)]
        if self.costs:
            header = ["", "ms a step", "in training", "time", "peak memory", "step", "of the time"]
            rows = [self._at_equal_time(outcome, reference, images) for outcome in outcomes]
            heading = f"At equal time, that of {steps:,} steps of {self.reference}:"
            found.append((heading, [*header, "validation loss", "difference", *accuracy], rows))
        return found

    def _at_equal_steps(self, outcome: Outcome, reference: _Measured, images: bool) -> list[str]:
        run = next((run for run in self.runs if run.activation == outcome.activation), None)
        others = {} if outcome.activation == self.reference else reference
        beside = difference(outcome.final, others, LOSS)
        return [
            outcome.activation,
            "-" if run is None else f"{run.expansion_parameters:,}",
            _spread(outcome.final, LOSS),
            "-" if beside is None else f"{beside.mean:+.4f}",
            "-" if beside is None or beside.in_stds is None else f"{beside.in_stds:+.1f}",
            "-" if beside is None else f"{beside.better} of {beside.pairs}",
            *(_accuracy(outcome.final, others) if images else ()),
            str(len(outcome.final)),
            str(len(outcome.diverged)),
        ]

    def _at_equal_time(self, outcome: Outcome, reference: _Measured, images: bool) -> list[str]:
        cost = self.costs.get(outcome.activation)
        runs = [run for run in self.runs if run.activation == outcome.activation]
        trained = [run.step_seconds for run in runs if run.step_seconds is not None]
        others = {} if outcome.activation == self.reference else reference
        beside = difference(outcome.at_equal_time, others, LOSS)
        return [
            outcome.activation,
            "-" if cost is None else f"{1e3 * cost.seconds:.4g}",
            f"{1e3 * statistics.median(trained):.4g}" if trained else "-",
            "-" if outcome.time_ratio is None else f"{outcome.time_ratio:.3f}",
            "-" if outcome.memory_ratio is None else f"{outcome.memory_ratio:.3f}",
            "-" if outcome.equal_time_step is None else f"{outcome.equal_time_step:,}",
            "-" if outcome.time_share is None else f"{outcome.time_share:.0%}",
            _spread(outcome.at_equal_time, LOSS),
            "-" if beside is None else f"{beside.mean:+.4f}",
            *(_accuracy(outcome.at_equal_time, others) if images else ()),
        ]

    def _notes(self) -> list[str]:
        notes = [
            "± is the sample standard deviation over seeds. A difference is the mean over the seeds that both finished "
            f"of the value less that of {self.reference}, also in units of the larger of the two deviations."
        ]
        if self.costs:
            environment = self.costs_environment
            count = environment.get("threads")
            threads = "" if count is None else f", {count} thread{'' if count == 1 else 's'}"
            notes += [
                f'"time" and "peak memory" are ratios to {self.reference} of a training step, measured in turns in one '
                f"process ({environment['hardware']}{threads}, {environment['date']}), medians; memory is what a step "
                'allocates beyond weights, optimizer state and inputs. "in training" is the median of the runs\' own '
                "steps, whatever else the machine did.",
                "At equal time, a slower activation is read at its last validation within the time, where its "
                "learning rate has not come down, which is to its disadvantage; a faster one has time left.",
            ]
        notes += [
            f"{r.activation} diverged with seed {r.seed}: {r.diverged}" for r in self.runs if r.diverged is not None
        ]
        return notes


def equal_time_step(validated: Sequence[int], steps: int, ratio: float) -> int | None:
    """The last validated step that ends within the time of `steps` steps of the reference.

    Args:
        validated: steps with a validation.
        steps: steps of the whole run.
        ratio: time of a step divided by the reference's.
    """
    return max((step for step in validated if step * ratio <= steps), default=None)


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; a single value has no deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def difference(values: _Measured, reference: _Measured, measure: str) -> Difference | None:
    """The difference of a measure from the reference's, paired by seed; None if they have no seed in common."""
    pairs = [(values[seed][measure], reference[seed][measure]) for seed in values if seed in reference]
    if not pairs:
        return None
    differences = [own - other for own, other in pairs]
    mean = statistics.fmean(differences)
    stds = [spread([measured[measure] for measured in each.values()])[1] for each in (values, reference)]
    larger = max((std for std in stds if std is not None), default=0.0)
    in_stds = mean / larger if None not in stds and larger > 0 else None
    sign = 1 if measure == ACCURACY else -1
    return Difference(mean, in_stds, sum(sign * own > 0 for own in differences), len(pairs))


def _spread(values: _Measured, measure: str, scale: float = 1, digits: int = 4) -> str:
    if not values:
        return "-"
    mean, std = spread([scale * measured[measure] for measured in values.values()])
    return f"{mean:.{digits}f} ± {'-' if std is None else format(std, f'.{digits}f')}"


def _accuracy(values: _Measured, reference: _Measured) -> tuple[str, str]:
    """Accuracy in percent, and its difference in points."""
    beside = difference(values, reference, ACCURACY)
    return _spread(values, ACCURACY, 100, 2), "-" if beside is None else f"{100 * beside.mean:+.2f}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, subsequent_indent="  " if text.startswith("- ") else "", break_on_hyphens=False)
