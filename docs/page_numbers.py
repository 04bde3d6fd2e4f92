"""Keeps the numbers and tables of the pages equal to the result files.

    python docs/page_numbers.py    rewrites what differs, and names the pages

A number on a page has its source behind it, `0.49<!-- time hermite 3 -->`, and a table has it above. Readers of the
page don't see that. `python docs/pictures/bases.py` writes the numbers of the bases themselves.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ortho_fx.bases import OURS, basis_named
from ortho_fx.models.compare.costs import equal_time_steps
from ortho_fx.models.compare.report import ACCURACY, LOSS, Comparison, digits_for
from ortho_fx.models.compare.statistics import Difference, Measured, difference, spread, t_interval

DOCS = Path(__file__).parent
ROOT = DOCS.parent
READMES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
PAGES = [*READMES, *sorted(DOCS.glob("**/*.md")), DOCS / "pictures" / "which_basis.svg"]
NUMBER = re.compile(r"([-\d.e∞]+)(<!-- (\w+) ([^>]+?) -->)")
TABLE = re.compile(r"(<!-- table (\w+) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_FORMS = {
    "polynomial": "a polynomial in powers of x, by Horner's rule",
    "waves": "a constant and the waves that are above rounding",
    "maximum": "a maximum of the lines that are needed",
    "difference": "a difference of two maxima, of the lines that are needed",
    "formula": "the same formula, with constants",
}
_ABSENT = "–"


def result(name: str) -> Any:
    folder = ROOT / ("examples" if name == "pinn" else "benchmarks") / "results"
    return json.loads((folder / f"{name}.json").read_text())


def time(name: str) -> str:
    """The time of forward and backward together, relative to compiled GELU."""
    return f"{_speed(name)['ratios']['total']:.2f}"


def time_a_channel(name: str) -> str:
    """The same with one expansion for each channel."""
    return f"{_speed(f'{name} a channel')['ratios']['total']:.2f}"


def depth(name: str) -> str:
    """The accuracy of a plain network of 100 layers on digits, in per cent: "hermite usual", or "hermite deep"."""
    activation, start = name.split()
    setting = {"usual": "usual start", "deep": "depth:L, orthogonal"}[start]
    wanted = (activation, setting, 100)
    rows = result("deep_training")["rows"]
    own = [row["accuracy"] for row in rows if (row["activation"], row["setting"], row["depth"]) == wanted]
    return f"{100 * max(own):.0f}"


def loss(name: str) -> str:
    """The last validation loss of a comparison, as mean over its seeds: "gpt2 hermite:3"."""
    comparison, activation = name.split(maxsplit=1)
    ended = _comparison(comparison).outcome(activation).at_equal_steps
    return f"{statistics.fmean(values[LOSS] for values in ended.values()):.3f}"


def below(name: str) -> str:
    """By how much an activation's loss ends below that of the reference, as mean over seeds: "gpt2 hermite:3"."""
    comparison, activation = name.split(maxsplit=1)
    compared = _comparison(comparison)
    own, reference = (compared.outcome(one).at_equal_steps for one in (activation, compared.reference))
    beside = difference(own, reference, LOSS, False)
    assert beside is not None
    return f"{-beside.mean:.3f}"


def loss_in_time(name: str) -> str:
    """The last validation loss at equal time, as mean over the seeds: "gpt2_tuned hermite:3"."""
    comparison, activation = name.split(maxsplit=1)
    return f"{statistics.fmean(_losses(_comparison(comparison).outcome(activation).at_equal_time)):.3f}"


def step(name: str) -> str:
    """The time of a training step relative to GELU: "gpt2 hermite 3"."""
    model, expansion = name.split(maxsplit=1)
    return f"{_row(result('speed_cpu')[model], expansion)['ratios']['total']:.2f}"


def compile_time(name: str) -> str:
    return f"{result('speed_cpu')['compile']['ratios'][name]:.2f}"


def rmse(name: str) -> str:
    """The rmse of a fit for inputs N(0, 1): "hermite GELU", or "hermite 8" for GELU at another degree."""
    basis, fitted = name.split()
    numbers = result("bases")["bases"][basis]
    return _short(numbers["gelu_rmse"][fitted] if fitted.isdigit() else numbers["fits"][fitted]["rmse"])


def basin(name: str) -> str:
    return _short(result("bases")["bases"][name]["starts"]["stable"]["basin"])


def below_gelu(name: str) -> str:
    """How far below that of GELU the loss is after fine-tuning, in nats, as mean over the seeds."""
    runs = result("fine_tuning")["runs"]
    ends = {one: statistics.fmean(run["after"] for run in runs if run["activation"] == one) for one in (name, "gelu")}
    return f"{ends['gelu'] - ends[name]:.4f}"


def annealed(name: str) -> str:
    """The accuracy of digits after annealing ReLU to a polynomial, in per cent, as mean over the seeds."""
    return f"{100 * statistics.fmean(run[name] for run in result('anneal')['runs']):.1f}"


NUMBERS: dict[str, Callable[[str], str]] = {
    function.__name__: function
    for function in (
        time,
        time_a_channel,
        depth,
        loss,
        below,
        loss_in_time,
        step,
        compile_time,
        rmse,
        basin,
        below_gelu,
        annealed,
    )
}


def parameters(name: str) -> list[list[str]]:
    basis = basis_named(name)
    rows = [["parameter", "shape at degree n", f"at n = {basis.default_degree}", "learns"]]
    for p in basis.parameters:
        terms = "1" if p.scalar else ("⌊n/2⌋" if p.halved else "n") + (f" + {p.offset}" if p.offset else "")
        shape = f"({terms},)" + " or (1,) if tied" * p.tieable
        rows.append([f"`{p.name}`", shape, f"({p.size(basis.default_degree)},)", "yes" if p.learnable else "no"])
    return rows


def facts(name: str) -> list[list[str]]:
    basis, numbers = basis_named(name), result("bases")["bases"][name]
    far = ", ".join(f"{_short(y)} at {float(x):g}" for x, y in numbers["start_far_away"].items())
    return [
        ["property", "value"],
        ["degrees", f"{basis.degrees[0]} to {basis.degrees[-1]}; {basis.default_degree} when omitted"],
        ["learnable numbers", f"{numbers['learnable']} at degree {numbers['degree']}"],
        ["the stable start far from zero", far],
        ["a polynomial of x", "yes" if numbers["polynomial"] else "no"],
        ["after `freeze_`", _FORMS[numbers["frozen_form"]]],
    ]


def starts(name: str) -> list[list[str]]:
    rows = [["start", "forward gain", "backward gain", "slope", "basin"]]
    for init, gain in result("bases")["bases"][name]["starts"].items():
        measured = (f"{gain[key]:.2f}" for key in ("forward", "backward", "slope"))
        rows.append([f'`"{init}"`', *measured, _short(gain["basin"])])
    return rows


def fits(name: str) -> list[list[str]]:
    rows = [["activation", "rmse", "largest error on [-5, 5]", "rmse of the derivative"]]
    for function, errors in result("bases")["bases"][name]["fits"].items():
        rows.append([function, *(_short(errors[key]) for key in ("rmse", "max_error", "derivative_rmse"))])
    return rows


def cost(name: str) -> list[list[str]]:
    speed = result("speed_cpu")
    rows = [["expansion", "forward", "backward", "together", "loops", "memory"]]
    for section in ("float32", "bases", "channel"):
        for row in speed[section]["rows"]:
            label = row["name"]
            if label.split()[0] != name or label in [done[0] for done in rows]:
                continue
            memory = row["peak_bytes"] / _row(speed[section], "gelu")["peak_bytes"]
            loops = f"{row['kernels']['forward']} + {row['kernels']['backward']}"
            times = (f"{row['ratios'][part]:.2f}" for part in ("forward", "backward", "total"))
            rows.append([label, *times, loops, f"{memory:.3f}"])
    return rows


def compared(_: str) -> list[list[str]]:
    """All bases at their usual degree."""
    deep = ["100 layers, %", "with `depth:100`, %"]
    rows = [["basis", "learnable numbers", "time", "fit of GELU, rmse", "basin", *deep, "GPT-2, nats"]]
    for basis in OURS:
        numbers, label = result("bases")["bases"][basis.name], f"{basis.name} {basis.default_degree}"
        row = [f"[`{label}`]({basis.name}.md)", str(numbers["learnable"]), time(label), rmse(f"{basis.name} GELU")]
        row += [basin(basis.name), depth(f"{basis.name} usual"), depth(f"{basis.name} deep")]
        rows.append([*row, _if_measured(loss, f"gpt2 {basis.name}:{basis.default_degree}")])
    rows.append(["GELU itself", "0", "1", "0", _ABSENT, depth("gelu usual"), _ABSENT, loss("gpt2 gelu")])
    return rows


def runs(comparison: str) -> list[list[str]]:
    """A comparison at equal steps, with the time of a training step: "gpt2"."""
    compared = _comparison(comparison)
    reference = compared.outcome(compared.reference).at_equal_steps
    rows = [["activation", "validation loss, nats", f"less {compared.reference}'s", "seeds below", "time of a step"]]
    for activation in compared.activations:
        own = compared.outcome(activation).at_equal_steps
        beside = difference(own, reference, LOSS, larger_is_better=False)
        others = [_ABSENT, _ABSENT]
        if activation != compared.reference and beside is not None:
            others = [f"{beside.mean:+.3f}", f"{beside.better} of {beside.pairs}"]
        rows.append([f"`{activation}`", _spread(_losses(own)), *others, f"{compared.time_ratio(activation):.2f}"])
    return rows


def ranking(comparison: str) -> list[list[str]]:
    """A comparison at equal time, the lowest loss first: "gpt2_tuned"."""
    compared = _comparison(comparison)
    ended = {name: compared.outcome(name).at_equal_time for name in compared.activations}
    ordered = sorted(filter(ended.get, ended), key=lambda name: statistics.fmean(_losses(ended[name])))
    of = [_name(name) for name in (compared.reference, ordered[0])]
    images = any(ACCURACY in measured for measured in ended[ordered[0]].values())
    lowest = statistics.fmean(_losses(ended[ordered[0]]))
    digits = digits_for(lowest, 3)
    title = ", ".join(filter(None, ["validation loss", compared.loss_unit]))
    header = ["", title, *(f"less that of {name}" for name in of)]
    rows = [[*header, *["accuracy, %"] * images, "time of a step"]]
    for name in ordered:
        beside = [
            _ABSENT if name == other else _minus(difference(ended[name], ended[other], LOSS, False), digits)
            for other in (compared.reference, ordered[0])
        ]
        row = [_name(name), _spread(_losses(ended[name]), digits), *beside]
        if images:
            row.append(_spread([100 * measured[ACCURACY] for measured in ended[name].values()], 1))
        rows.append([*row, f"{compared.time_ratio(name):.2f}"])
    return rows


_LEVELS = (2.0, 1.8, 1.6, 1.4, 1.3, 1.2)


def reached(comparison: str) -> list[list[str]]:
    """The steps in which the runs of equal time came down to some levels of the validation loss: "gpt2_long"."""
    compared = _comparison(comparison)
    ending = {name: compared.equal_time_steps(name) for name in compared.activations}
    rows = [["steps to a validation loss of", *(f"{level:.1f}" for level in _LEVELS)]]
    for name in compared.activations:
        found = [run.validations for run in compared.runs if (run.activation, run.steps) == (name, ending[name])]
        if found:
            steps = [statistics.fmean(_crossing(validations, level) for validations in found) for level in _LEVELS]
            rows.append([_name(name), *(f"{round(step, -1):,.0f}" for step in steps)])
    return rows


def _crossing(validations: Mapping[int, Mapping[str, float]], level: float) -> float:
    """The step at which a straight line between two validations has the level."""
    points = [(step, measured[LOSS]) for step, measured in sorted(validations.items())]
    (start, high), (end, low) = next(
        (one, other) for one, other in itertools.pairwise(points) if other[1] <= level < one[1]
    )
    return start + (end - start) * (high - level) / (high - low)


def trials(comparison: str) -> list[list[str]]:
    """The losses of the trials of learning rates, the lowest first: "gpt2_long" with its "gpt2_long_trials", if any."""
    found: dict[str, dict[float, float | None]] = {}
    earlier = f"{comparison}_trials"
    for name in (earlier, comparison) if _is_compared(earlier) else (comparison,):
        for one in _comparison(name).trials:
            found.setdefault(one.activation, {})[one.lr] = one.loss
    rates = sorted({rate for losses in found.values() for rate in losses}, reverse=True)
    best = {name: min(loss for loss in losses.values() if loss is not None) for name, losses in found.items()}
    rows = [["validation loss, nats", *(f"lr {rate:g}" for rate in rates)]]
    for name in sorted(best, key=best.__getitem__):
        losses = [found[name].get(rate) for rate in rates]
        rows.append([_name(name), *(_ABSENT if loss is None else f"{loss:.3f}" for loss in losses)])
    return rows


def settings(comparison: str) -> list[list[str]]:
    """What settings change beside the reference, after a quarter of the steps and at the end: "narrow_gpt2"."""
    compared = _comparison(comparison)
    steps = compared.steps // 4, compared.steps

    def measured(name: str, step: int) -> Measured:
        runs = [run for run in compared.runs if (run.activation, run.steps, run.diverged) == (name, steps[1], None)]
        return {run.seed: run.validations[step] for run in runs}

    beside = {
        name: [difference(measured(name, step), measured(compared.reference, step), LOSS, False) for step in steps]
        for name in compared.activations
        if name != compared.reference
    }
    ended = {name: both[-1].mean for name, both in beside.items() if both[-1] is not None}
    less = f"less that of `{compared.reference}` after"
    rows = [["activation and settings", "seeds", *(f"{less} {step:,} steps" for step in steps)]]
    for name in sorted(ended, key=ended.__getitem__):
        rows.append([f"`{name}`", str(len(measured(name, steps[1]))), *map(_minus, beside[name])])
    return rows


def harvested(recipe: str) -> list[list[str]]:
    """What of the gain of a learned function is left where other runs start from it."""
    compared = Comparison.from_dict(result("harvested")[recipe]["comparison"])
    reference = compared.outcome(compared.reference).at_equal_steps
    rows = [["", "validation loss, nats", "less GELU's, equal steps", "time of a step", "less GELU's, equal time"]]
    for name in compared.activations:
        own = compared.outcome(name)
        beside = [
            _minus(difference(values, reference, LOSS, False)) for values in (own.at_equal_steps, own.at_equal_time)
        ]
        if name == compared.reference:
            label, beside = "GELU", [_ABSENT] * 2
        elif "preset:" in name:
            label = f"the harvested function, {'frozen' if ':frozen' in name else 'which learns on'}"
        else:
            label = "Fourier 5, learned from its stable start"
        rows.append([label, _spread(_losses(own.at_equal_steps)), beside[0], f"{own.time_ratio:.2f}", beside[1]])
    return rows


def _is_compared(name: str) -> bool:
    return (ROOT / "benchmarks" / "results" / f"compare_{name}.json").exists()


def _comparison(name: str) -> Comparison:
    return Comparison.from_dict(result(f"compare_{name}"))


def _name(activation: str) -> str:
    """An activation as the pages write it, without its learning rates."""
    activation = re.sub(r",(expansion_)?lr=[^,]+", "", activation)
    usual = {"gelu": "GELU", "relu_squared": "ReLU²", "swiglu": "SwiGLU", "fourier:1": "one sine (Fourier 1)"}
    usual |= {"fourier:1:gated": "one sine as SwiGLU's gate", "leaky_relu_squared": "LeakyReLU²"}
    usual |= {"polynorm:3": "PolyNorm", "xielu": "xIELU", "fourier:5,granularity=group:8": "Fourier 5 in 8 groups"}
    usual |= {
        "fourier:5,granularity=model": "Fourier 5, one for all layers",
        "fourier:5:tied": "Fourier 5, tied",
        "sine": "sin x",
        "tanh": "tanh",
    }
    return usual.get(activation) or activation.replace(":", " ").replace("_", " ").capitalize()


def _losses(values: Measured) -> list[float]:
    return [measured[LOSS] for measured in values.values()]


def _spread(values: Sequence[float], digits: int = 3) -> str:
    mean, deviation = spread(values)
    return f"{mean:.{digits}f}" if deviation is None else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _minus(beside: Difference | None, digits: int = 3) -> str:
    if beside is None:
        return _ABSENT
    interval = "" if beside.t is None else " ({:+.{d}f} to {:+.{d}f})".format(*beside.t, d=digits)
    return f"{beside.mean:+.{digits}f}{interval}"


def times(_: str) -> list[list[str]]:
    """Some expansions compiled, relative to GELU."""
    rows = [["expansion", "forward and backward", "with one a channel", "compilation"]]
    compilation = result("speed_cpu")["compile"]["ratios"]
    for basis in OURS:
        label = f"{basis.name} {basis.default_degree}"
        compiled = f"{compilation[label]:.2f}" if label in compilation else _ABSENT
        rows.append([f"`{label}`", time(label), _if_measured(time_a_channel, label), compiled])
    return rows


def pinn(_: str) -> list[list[str]]:
    """The errors of each activation for each equation: the median of the seeds, and the lowest and highest."""
    kept = result("pinn")
    titles = {"poisson": "Poisson", "helmholtz": "Helmholtz", "burgers": "Burgers"}
    found = {name: kept[name]["activations"] for name in titles if name in kept}
    rows = [["", *(titles[name] for name in found)]]
    for label in found["poisson"]:
        rows.append([label, *(_errors(own, label) for own in found.values())])
    return rows


def _errors(measured: Any, label: str) -> str:
    if label not in measured:
        return _ABSENT
    errors = sorted(measured[label]["errors"])
    text = f"{statistics.median(errors):.1e} ({errors[0]:.1e} to {errors[-1]:.1e})"
    best = min(row["median"] for row in measured.values())
    return f"**{text}**" if measured[label]["median"] == best else text


def least(_: str) -> list[list[str]]:
    """The least errors of networks that are polynomials, by their degree."""
    kept = {name: own for name, own in result("pinn").items() if "least_polynomial_errors" in own}
    rows = [["degree", *(name.capitalize() for name in kept)]]
    for degree in next(iter(kept.values()))["least_polynomial_errors"]:
        rows.append([degree, *(f"{own['least_polynomial_errors'][degree]:.1e}" for own in kept.values())])
    return rows


def forms(_: str) -> list[list[str]]:
    """The time of a loss with its gradients in each form, and the releases that compile it as a whole."""
    measured = {key.split()[1]: own["forms"] for key, own in result("pinn").items() if key.startswith("forms ")}
    newest = max(measured, key=lambda release: [int(part) for part in release.split(".")])
    rows = [["form", *(f"{label}, ms" for label in measured[newest]), "compiles as a whole on PyTorch"]]
    for form in next(iter(measured[newest].values())):
        times = [f"{own[form]['eager_ms']:.1f}" if form in own else _ABSENT for own in measured[newest].values()]
        taken = [
            name for name, own in measured.items() if all(row.get(form, {}).get("compiles") for row in own.values())
        ]
        rows.append([form, *times, ", ".join(taken) or "none"])
    return rows


def transfer(_: str) -> list[list[str]]:
    """Fine-tuning with fits, beside GELU."""
    kept = result("transfer")
    rows = [["", "loss before", "after", "accuracy", "minus GELU, equal steps", "step time", "minus GELU, equal time"]]
    for label, ratio in kept["step_time_ratios"].items():
        own = [run for run in kept["runs"] if (run["activation"], run["steps"]) == (label, kept["steps"])]
        before = statistics.fmean(run["losses"]["0"] for run in own)
        after = statistics.fmean(_last(run, "losses") for run in own)
        accuracy = statistics.fmean(_last(run, "accuracies") for run in own)
        beside = ["–", "–"] if label == "gelu" else [_minus_gelu(kept, label, equal) for equal in (False, True)]
        rows.append(
            [label, f"{before:.4f}", f"{after:.4f}", f"{100 * accuracy:.1f} %", beside[0], f"{ratio:.2f}", beside[1]]
        )
    return rows


def _last(run: Any, of: str) -> float:
    return run[of][str(run["steps"])]


def _minus_gelu(kept: Any, label: str, equal_time: bool) -> str:
    """The mean of the paired differences of the last losses, with the 95 % interval of Student's t."""
    steps = equal_time_steps(kept["steps"], kept["step_time_ratios"][label]) if equal_time else kept["steps"]
    last = {
        (run["activation"], run["seed"]): _last(run, "losses")
        for run in kept["runs"]
        if run["steps"] == (kept["steps"] if run["activation"] == "gelu" else steps)
    }
    found = [last[label, seed] - last["gelu", seed] for seed in range(kept["seeds"])]
    low, high = t_interval(found) or (float("nan"), float("nan"))
    return f"{statistics.fmean(found):+.4f} ({low:+.4f} to {high:+.4f})"


TABLES: dict[str, Callable[[str], list[list[str]]]] = {
    function.__name__: function
    for function in (
        parameters,
        facts,
        starts,
        fits,
        cost,
        compared,
        ranking,
        reached,
        trials,
        runs,
        settings,
        harvested,
        times,
        pinn,
        least,
        forms,
        transfer,
    )
}


def renewed(text: str) -> str:
    """The page with today's numbers and tables."""
    text = TABLE.sub(lambda found: f"{found[1]}{_markdown(TABLES[found[2]](found[3]))}{found[4]}", text)
    return NUMBER.sub(lambda found: NUMBERS[found[3]](found[4]) + found[2], text)


def _markdown(rows: list[list[str]]) -> str:
    head, *others = rows
    lines = [head, ["---"] * len(head), *others]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _row(section: Any, name: str) -> Any:
    return next(row for row in section["rows"] if row["name"] == name)


def _speed(name: str) -> Any:
    speed = result("speed_cpu")
    sections = [
        speed[key] for key in ("float32", "bases", "channel") if any(row["name"] == name for row in speed[key]["rows"])
    ]
    return _row(sections[0], name)


def _if_measured(number: Callable[[str], str], name: str) -> str:
    try:
        return number(name)
    except (LookupError, StopIteration, statistics.StatisticsError):
        return _ABSENT


def _short(value: float) -> str:
    """Two digits; plain notation where it is short."""
    if value == float("inf"):
        return "∞"
    if abs(value) < 1e-12:
        return "0"
    return f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.2g}"


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        if (new := renewed(text)) != text:
            page.write_text(new)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
