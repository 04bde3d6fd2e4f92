"""`compare`: the same training run with several activations and several seeds.

An `Activation` says how its runs are built from the common settings. The plan follows from the settings and from what
is measured, so the same call makes the same plan after a kill, and leaves out what compare.json records:

1. Checks: every activation is built once, and compared with the reference's weights.
2. Costs: a training step of each activation, in turns. They decide how many steps take the reference's time.
3. Trials, with `tune`: learning rates, the same number for each, on a seed that is not reported.
4. Runs: for each seed and activation, one of equal steps and one of equal time, or one of the two. Seeds are the outer
   loop, so that an interrupted comparison is balanced. A run is known by its activation, its seed and its number of
   steps.

    OUT/SLUG-seedN/     one run of equal steps, as `train` writes it; OUT/SLUG-seedN-stepsM/ one of equal time
    OUT/compare.json    what is known so far, unrounded; rewritten after each run
    OUT/compare.md, .csv, .tex    the tables
    OUT/compare.png     the picture

Runs of one seed share every batch and, where the shapes allow it, their initial weights.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx.bench.report import environment_of
from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file, reason, remove_unfinished
from ortho_fx.models.compare.activations import Activation, choose_activations
from ortho_fx.models.compare.costs import bench_config, measure_steps
from ortho_fx.models.compare.execute import Job, train_all
from ortho_fx.models.compare.plot import plot_comparison
from ortho_fx.models.compare.report import ACCURACY, LOSS, ComparedRun, Comparison, Facts
from ortho_fx.models.compare.tuning import Trial, best, trials_of
from ortho_fx.models.data.digest import data_digest
from ortho_fx.models.recipe import TrainConfig, differences
from ortho_fx.models.runs.files import read_run
from ortho_fx.models.runs.lock import locked
from ortho_fx.models.training.build import Built, build
from ortho_fx.models.training.processes import launched
from ortho_fx.plots import load_pyplot

# Settings of a single activation or run, and settings that do not change a run's results.
_NOT_IN_COMMON = {"basis", "degree", "tied", "gated", "freeze", "stock", "seed", "out"}
_NOT_IN_COMMON |= {"workers", "parallel", "save_every", "keep", "log"}
_WRITTEN = ("compare.json", "compare.md", "compare.csv", "compare.tex", "compare.png")
_FEWEST_TRIALS = 2


@dataclass(frozen=True)
class Budget:
    """What a comparison may take.

    Args:
        seeds: how many of each activation are reported.
        timing: whether to measure time and memory of a training step.
        equal_time: whether to train the runs of equal time; it needs the timing.
        equal_steps: whether to train the runs of equal steps. Without them, the reference alone has the common number
            of steps, and the others have runs of equal time.
        tune: trials of each activation's learning rates; 0 for none.
        tune_steps: of each trial (None: those of a run).
        jobs: runs that are trained at a time, each on one thread if there are several.

    Raises:
        OrthoFxError: a number that is out of range.
    """

    seeds: int
    timing: bool = True
    equal_time: bool = True
    equal_steps: bool = True
    tune: int = 0
    tune_steps: int | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("tune", 0), ("tune_steps", 1), ("jobs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OrthoFxError(f"{name} must be {least} or more; got {value}")
        if 0 < self.tune < _FEWEST_TRIALS:
            raise OrthoFxError(
                f"tune must be 0 or at least {_FEWEST_TRIALS}, since the first trial has the rates of the run; "
                f"got {self.tune}"
            )
        if self.tune_steps is not None and not self.tune:
            raise OrthoFxError("tune_steps is of trials, and tune asks for none")
        if not (self.equal_steps or (self.timing and self.equal_time)):
            raise OrthoFxError("without runs of equal steps, runs of equal time are needed, and these need the timing")


def compare(
    config: TrainConfig,
    activations: Sequence[str],
    budget: Budget,
    out: str | Path,
    *,
    reference: str = "gelu",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    to_go_on: str = "the same call goes on",
    prepare: Callable[[], None] | None = None,
) -> Comparison:
    """Trains every activation with every seed, and writes the tables and the picture.

    Runs that `out` holds are not trained again: an interrupted comparison goes on, and new activations or seeds are
    added to it. A run that diverges is recorded with its reason, and the others go on.

    Args:
        config: the settings that all runs have in common. Its basis, degree, tied, gated, freeze, stock and out are not
            used; its seed is the first.
        activations: as `Activation.parse` reads them.
        budget: how many seeds and trials, and what is measured.
        out: directory of the comparison.
        reference: the activation that the others are compared with; added if it is not among them.
        overwrite: start anew although `out` holds a comparison; the runs recorded there or asked for are removed.
        progress: called with a line of text whenever a run or a measurement begins.
        to_go_on: what a comparison that ends early advises.
        prepare: called first in each process of several jobs, to register bases from outside; a function of a module.

    Raises:
        OrthoFxError: a wrong activation, the same one twice, a comparison with other settings or other data in `out`,
            another comparison that writes there, several processes, no matplotlib, a budget that is too small for a
            run, or any error of `train` except `Diverged`.
        KeyboardInterrupt, Terminated: after SIGINT or SIGTERM, once the runs under way are saved.
    """
    if launched():
        raise OrthoFxError("a comparison is one process that starts its runs itself; torchrun started several")
    out = Path(out)
    common = replace(config, basis="none", degree=None, tied=False, gated=False, freeze=False, stock=None)
    chosen = choose_activations(activations, reference, common)
    if budget.tune_steps is not None and budget.tune_steps > _steps(common):
        raise OrthoFxError(f"tune_steps must be at most the {_steps(common)} steps of a run; got {budget.tune_steps}")
    load_pyplot()  # A missing matplotlib is an error now, not after hours of training.
    with locked(out):
        try:
            remove_unfinished(out, _WRITTEN)
            return _Work(common, chosen, budget, out, progress, to_go_on, prepare).run(overwrite)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(str(interrupt) or to_go_on) from None


def load_comparison(out: str | Path) -> Comparison:
    """The comparison of a directory, with the runs that are done so far.

    Raises:
        OrthoFxError: a directory without one, or a file that cannot be read.
    """
    path = Path(out) / "compare.json"
    try:
        return Comparison.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise OrthoFxError(f"cannot read {path}: {reason(error)}") from None


class _Work:
    """A comparison under way; the arguments are those of `compare`."""

    def __init__(
        self,
        config: TrainConfig,
        chosen: Sequence[Activation],
        budget: Budget,
        out: Path,
        progress: Callable[[str], None],
        to_go_on: str,
        prepare: Callable[[], None] | None,
    ) -> None:
        self.config, self.budget, self.out = config, budget, out
        self.progress, self.to_go_on, self.prepare = progress, to_go_on, prepare
        self.activations = {activation.label: activation for activation in chosen}
        self.reference = chosen[0].label
        self.threads = 1 if budget.jobs > 1 else None

    def run(self, overwrite: bool) -> Comparison:
        self._open(overwrite)
        if self.budget.timing:
            self._measure()
        self._save()
        trials = self._trials()
        self._announce([*trials, *self._runs()], len(trials))
        self._train(trials)
        # Planned anew: the trials have decided the rates.
        self._train(self._runs())
        self._save()
        if any(run.diverged is None for run in self.comparison.runs):
            plot_comparison(self.comparison, self.out / "compare.png")
        return self.comparison

    def _config(self, label: str, seed: int, steps: int | None = None, **rates: Any) -> TrainConfig:
        """The run of an activation with a seed. With other steps, the schedule is squeezed or stretched to them."""
        found = self.activations[label].configure(self.config, seed, self.out)
        if steps is not None and steps != found.steps:
            share = steps / _steps(found)
            found = replace(found, steps=steps, warmup=round(found.warmup * share), out=f"{found.out}-steps{steps}")
        return replace(found, **rates)

    def _open(self, overwrite: bool) -> None:
        """Takes up the comparison in `out`, or begins one, once every activation has been built and tried."""
        plain = self._config(self.reference, self.config.seed, basis="none", degree=None, tied=False, freeze=False)
        first = build(replace(plain, stock=None, expansion_lr=None, expansion_decay=0.0))
        self.comparison = self._opened(first, overwrite)
        weights = {name: value.detach().clone() for name, value in first.model.named_parameters()}
        for label in self.activations:
            if label not in self.comparison.facts:
                self.comparison.facts[label] = self._facts(label, weights)

    def _facts(self, label: str, weights: Mapping[str, Tensor]) -> Facts:
        """What is known of an activation before its runs; an error if it does not fit the model.

        Args:
            label: of the activation.
            weights: those of the reference without its activations' own.
        """
        config = self._config(label, self.config.seed)
        assert config.batch_size is not None
        try:
            built = build(config)
            inputs, targets = built.data.batch(config.seed, 0, config.batch_size, slice(0, min(config.batch_size, 4)))
            if built.loss is not None:
                loss = built.loss(built.model, (inputs, targets))
                if not loss.requires_grad:
                    raise OrthoFxError(
                        f"loss(model, batch) of {config.model} has no gradient: it is not computed from parameters "
                        "that learn"
                    )
            with torch.no_grad():
                built.model(inputs)
        except OrthoFxError as error:
            raise OrthoFxError(f"{label}: {error}") from None
        except Exception as error:  # of a user's model or a library's activation
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise OrthoFxError(f"{label}: {config.model} cannot be trained with it: {what}") from error
        own = dict(built.model.named_parameters())
        same = all(name not in own or _equal(own[name], value) for name, value in weights.items())
        return Facts(sum(parameter.numel() for parameter in own.values()), same)

    def _opened(self, first: Built, overwrite: bool) -> Comparison:
        """The comparison in `out`, with the named activations added, or a new one without runs."""
        config, out = self.config, self.out
        settings = {name: value for name, value in asdict(config).items() if name not in _NOT_IN_COMMON}
        settings["data"], settings["data_sha256"] = first.data.name, data_digest(first.data)
        settings["tune"] = self.budget.tune
        settings["tune_steps"] = (self.budget.tune_steps or config.steps) if self.budget.tune else None
        names = list(self.activations)
        environment = environment_of(bench_config(config, self.threads))
        new = Comparison(settings, self.reference, names, environment)
        if overwrite:
            self._remove()
        elif (out / "compare.json").exists():
            old = load_comparison(out)
            # Comparisons of earlier releases lack what was added since, and had none of it.
            added = {one.name: one.default for one in fields(TrainConfig) if one.name in settings}
            lacking = {**added, "data_sha256": settings["data_sha256"], "tune": 0, "tune_steps": None}
            different = differences({**lacking, **old.settings}, settings)
            if different:
                raise OrthoFxError(
                    f"{out} holds a comparison with other settings: {', '.join(different)}; choose another --out, or "
                    "pass --overwrite"
                )
            new.activations = list(dict.fromkeys([names[0], *old.activations, *names]))
            new.runs, new.costs, new.trials, new.facts = old.runs, old.costs, old.trials, old.facts
            for run in new.runs:  # files of earlier releases have one place for all
                run.hardware = run.hardware or old.environment["hardware"]
                run.torch = run.torch or old.environment["versions"]["torch"]
        return new

    def _remove(self) -> None:
        """Removes the runs that are recorded in `out`, and those that are asked for."""
        seeds = range(self.config.seed, self.config.seed + self.budget.seeds)
        directories = {self._config(label, seed).directory for label in self.activations for seed in seeds}
        directories.add(self.out / "trials")
        with contextlib.suppress(OrthoFxError):
            directories |= {self.out / Path(run.directory).name for run in load_comparison(self.out).runs}
        for label in self.activations:
            slug = self.activations[label].slug
            directories |= {path for seed in seeds for path in self.out.glob(f"{slug}-seed{seed}-steps*")}
        for directory in filter(Path.is_dir, directories):
            with locked(directory):
                shutil.rmtree(directory, ignore_errors=True)

    def _measure(self) -> None:
        """Measures a training step of each activation that has no cost yet, in turns with the reference."""
        comparison = self.comparison
        missing = [label for label in self.activations if label not in comparison.costs]
        if not missing:
            return
        self.progress("measures a training step of each, in turns")
        labels = list(dict.fromkeys([self.reference, *missing]))
        found = measure_steps({label: self._config(label, self.config.seed) for label in labels}, self.threads)
        known = comparison.costs.get(self.reference)
        for label in missing:
            # Ratios are to the reference's step; an earlier measurement may have had another one in the first place.
            found[label].ratio *= 1 if known is None else known.ratio
            comparison.costs[label] = found[label]

    def _trials(self) -> list[Job]:
        """The trials that are still to be trained."""
        steps, found = self.comparison.settings["tune_steps"], list[Trial]()
        for label, activation in self.activations.items() if self.budget.tune else ():
            found += trials_of(activation, self._config(label, self.config.seed), self.budget.tune, steps)
        done = {(trial.activation, trial.number) for trial in self.comparison.trials}
        # Trial by trial, so that an interrupted comparison has tried as much of each.
        ordered = sorted(found, key=lambda trial: trial.number)
        return [self._job_of(trial) for trial in ordered if (trial.activation, trial.number) not in done]

    def _job_of(self, trial: Trial) -> Job:
        config = self._config(trial.activation, trial.seed, trial.steps, **trial.rates())
        directory = self.out / "trials" / f"{self.activations[trial.activation].slug}-{trial.number}"
        rates = f"lr {trial.lr:.3g}" + (
            "" if trial.expansion_lr is None else f", expansion_lr {trial.expansion_lr:.3g}"
        )
        title = f"trial {trial.number + 1} of {trial.activation}, {rates}"
        # Only the last validation counts.
        return Job(trial.activation, title, replace(config, out=str(directory), eval_every=trial.steps), trial)

    def _runs(self) -> list[Job]:
        """The runs that are still to be trained, with the best rates of the trials that are done."""
        comparison, planned = self.comparison, []
        for seed in range(self.config.seed, self.config.seed + self.budget.seeds):
            for label in self.activations:
                chosen = best(comparison.trials_of(label))
                # Every difference is to the reference's run of the common number of steps.
                endings = [comparison.steps] if self.budget.equal_steps or label == self.reference else []
                if self.budget.timing and self.budget.equal_time:
                    endings.append(self._equal_time_steps(label))
                for steps in dict.fromkeys(endings):
                    if comparison.find(label, seed, steps) is None:
                        config = self._config(label, seed, steps, **({} if chosen is None else chosen.rates()))
                        more = "" if steps == comparison.steps else f", {steps:,} steps of equal time"
                        planned.append(Job(label, f"{label}, seed {seed}{more}", config))
        return planned

    def _equal_time_steps(self, label: str) -> int:
        steps = self.comparison.equal_time_steps(label)
        assert steps is not None
        if steps < 1:
            raise OrthoFxError(
                f"a step of {label} takes more time than the {self.comparison.steps} steps of {self.reference}: leave "
                "it out, or ask for more steps"
            )
        return steps

    def _announce(self, jobs: Sequence[Job], trials: int) -> None:
        """Says before the first run how many there are, and about how long they take."""
        if not jobs:
            return
        runs = len(jobs) - trials
        counts = [f"{trials} trials"] if trials else []
        counts.append(f"{runs} run{'' if runs == 1 else 's'}")
        line = f"{' and '.join(counts)}, {sum(_steps(job.config) for job in jobs):,} steps in all"
        costs = self.comparison.costs
        if all(job.label in costs for job in jobs):
            seconds = sum(costs[job.label].seconds * _steps(job.config) for job in jobs) / self.budget.jobs
            duration = f"about {seconds / 60:,.0f} minutes" if seconds >= 90 else f"about {seconds:.0f} seconds"
            line += f": {duration}, besides compiling and validating"
        self.progress(line)

    def _train(self, jobs: Sequence[Job]) -> None:
        titled = [replace(job, title=f"{n} of {len(jobs)}: {job.title}") for n, job in enumerate(jobs, 1)]
        train_all(titled, self.budget.jobs, self._note, self.progress, self.to_go_on, self.prepare)

    def _note(self, job: Job, diverged: str | None) -> None:
        run = _result(job, diverged, self.comparison.environment)
        if job.trial is None:
            self.comparison.runs.append(run)
        else:
            loss = None if run.diverged is not None else run.last[LOSS]
            self.comparison.trials.append(replace(job.trial, loss=loss))
        self._save()
        if job.trial is not None:
            # Trials are many, and their weights are of no use.
            shutil.rmtree(job.config.directory, ignore_errors=True)

    def _save(self) -> None:
        comparison = self.comparison
        texts = {
            "compare.json": json.dumps(comparison.to_dict(), indent=1) + "\n",
            "compare.md": comparison.report(markdown=True) + "\n",
            "compare.csv": comparison.csv(),
            "compare.tex": comparison.latex() + "\n",
        }
        for name, text in texts.items():
            with atomic_file(self.out / name) as path:
                path.write_text(text, encoding="utf-8")


def _result(job: Job, diverged: str | None, environment: Mapping[str, Any]) -> ComparedRun:
    """The record of a run, from what it wrote and where it was trained."""
    config, steps = job.config, _steps(job.config)
    run = read_run(config.directory)
    measured = {row["step"]: {name: row[name] for name in (LOSS, ACCURACY) if name in row} for row in run.validations}
    validations = {step: values for step, values in measured.items() if math.isfinite(values[LOSS])}
    if diverged is None and steps not in validations:
        diverged = f"the validation loss is not finite at step {steps}"
    late = [row["loss"] for row in run.rows if row["step"] > steps - max(1, steps // 20) and math.isfinite(row["loss"])]
    return ComparedRun(
        job.label,
        config.seed,
        config.directory.name,
        parameters=run.config["parameters"],
        expansion_parameters=run.config["expansion_parameters"],
        validations=validations,
        step_seconds=statistics.median(row["seconds"] for row in run.rows) if run.rows else None,
        diverged=diverged,
        steps=steps,
        lr=config.lr,
        expansion_lr=config.expansion_lr,
        training_loss=statistics.fmean(late) if late and diverged is None else None,
        hardware=environment["hardware"],
        torch=environment["versions"]["torch"],
    )


def _steps(config: TrainConfig) -> int:
    assert config.steps is not None
    return config.steps


def _equal(own: nn.Parameter, value: Tensor) -> bool:
    return own.shape == value.shape and torch.equal(own, value)
