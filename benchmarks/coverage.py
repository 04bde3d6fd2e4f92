"""Coverage on real models: what `rewrite_` replaces, what it leaves and why, and what it misses.

    pip install -e ".[bench]"                                   # timm and transformers
    OMP_NUM_THREADS=1 python benchmarks/coverage.py             # [--library LIBRARY] [--only PATTERN ...] [--again]
    OMP_NUM_THREADS=1 python benchmarks/coverage.py --default   # only the training step with the default expansion
    python benchmarks/coverage.py --summary                     # only the text

An oracle that knows nothing of the rewrite (oracle.py) records every activation that a model runs, in train and in
eval. After `rewrite_` each of them must be gone, or be in the report with a reason; any other is an unexplained miss.
Plain gates must be called as before. Each model is also measured for:

- the relative error of the outputs if the expansions are fitted to the functions that they replace;
- a training step with the default expansion, `ExpansionConfig()`: outputs and gradients must be finite where those of
  the model as it was are;
- a training step with Hermite expansions of degree 3, in which every expansion that is called must get a finite
  gradient. If the values of a random network grow out of range, the step is done with clamped ones;
- a second rewrite, which must change nothing.

Weights are random, models are small (architectures.py), and each architecture is measured in a process of its own. All
of them take half an hour. Writes results/coverage.json, each row as soon as it is measured; rows in that file are not
measured again. `--default` completes these rows; it does so anew if the default is another than the file names. The
summary is printed and written to results/coverage.txt.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import itertools
import json
import math
import multiprocessing
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from architectures import Inputs, Spec, build, specs
from coverage_summary import line, summary
from oracle import Place, observe, tensors
from torch import Tensor, nn

from ortho_fx import ExpansionActivation, ExpansionConfig, OrthoFxError, RewriteReport, Site, find_sites, rewrite_

RESULT = Path(__file__).parent / "results" / "coverage.json"
DEFAULT = ExpansionConfig()
HERMITE = ExpansionConfig("hermite", 3)
CLAMPED = ExpansionConfig("hermite", 3, clamp=3.0)
FITTED = ExpansionConfig("tropical_rational", 32, init="fit")  # ReLU exactly, GELU and SiLU to 1e-4
TIMEOUT = 60


def explanation(place: Place, left: Iterable[Site]) -> str | None:
    """The reason that the report gives for the place; None if the report does not name the place.

    The report names it by the module that is the activation, by the line of a module that calls it, or by an attribute
    of that module.
    """
    for site in left:
        names = (site.name, *site.aliases)
        in_line = any(
            file == name and first <= line <= last for name, first, last, _ in place.frames for file, line in site.lines
        )
        kept = site.kind == "attribute" and site.function == place.operator
        owned = place.module in [name.rpartition(".")[0] for name in names]
        if place.module in names or (owned and (in_line or kept)):
            return site.reason
    return None


def measure(spec: Spec) -> dict[str, Any]:
    """The row of one model; only an error if it cannot be built."""
    try:
        model, inputs = build(spec)
    except Exception as error:
        return {"error": _short(error, 400)}
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "problems": []}
    row["unexplained"] = {"not observed after the rewrite": 1}
    plain, learnable, clamped, fitted = (copied(model, spec) for _ in range(4))
    try:
        before = observe(plain, inputs)  # in train it changes buffers
    except Exception as error:
        return {"error": f"not measured: the oracle failed: {_short(error, 400)}"}
    family, formulas, gates = (before["eval"][i] | before["train"][i] for i in range(3))
    row |= {"calls": len(family), "formulas": len(formulas), "gates": len(gates)}
    if "train_error" in before:
        row["train_error"] = before["train_error"][:200]

    start = time.process_time()  # others may use this machine
    try:
        report = rewrite_(learnable, HERMITE)
    except OrthoFxError as error:  # nothing to replace
        left = [site for site in find_sites(learnable) if site.reason]
        row["rewrite_error"] = _short(error, 400)
        row["left"] = _by_reason(left)
        explain(row, [*family, *formulas], left)
        return row
    except Exception as error:
        row["problems"].append(f"rewrite: {_short(error)}")
        return row
    row["rewrite_seconds"] = round(time.process_time() - start, 3)
    row["replaced"] = dict(Counter(site.kind for site in report.replaced))
    row["left"] = _by_reason(report.left)
    expansions, called, reached = watched(learnable)

    steps = {
        "rewritten": lambda: rewritten(row, learnable, inputs, before, report),
        "training": lambda: training(row, learnable, inputs, expansions, called, reached),
        "training, clamped": lambda: "diverged" in row and training_clamped(row, clamped, inputs),
        "default": lambda: row.update(default_finite=at_default(spec, model, inputs)),
        "idempotence": lambda: again(row, learnable),
        "fidelity": lambda: fidelity(row, model, fitted, inputs),
    }
    if "train_error" in row:
        del steps["training"]
    for name, run in steps.items():
        try:
            run()
        except OverflowError as error:  # cubes drive some random networks out of range; clamped ones may stay within
            if name == "training":
                row["diverged"] = str(error)
            else:
                row["problems"].append(f"{name}: {error}")
        except Exception as error:
            row["problems"].append(f"{name}: {_short(error)}")
    row["uncalled"] = sorted(set(expansions) - called)
    return row


def copied(model: nn.Module, spec: Spec) -> nn.Module:
    """A copy of the model; some models cannot be copied, and are built again."""
    try:
        return copy.deepcopy(model)
    except Exception:
        return build(spec)[0]


def _by_reason(left: Iterable[Site]) -> dict[str, int]:
    return dict(Counter(f"{site.function}: {site.reason}" for site in left))


def watched(model: nn.Module) -> tuple[dict[str, nn.Module], set[str], set[str]]:
    """The expansions of a model, the names of those that are called, and of those that a backward pass reaches."""
    expansions = {name: module for name, module in model.named_modules() if isinstance(module, ExpansionActivation)}
    called: set[str] = set()
    reached: set[str] = set()

    def note(name: str, output: Tensor) -> None:
        called.add(name)
        if output.requires_grad:
            output.register_hook(lambda _: reached.add(name))

    for name, expansion in expansions.items():
        expansion.register_forward_hook(lambda _, __, output, name=name: note(name, output))
    return expansions, called, reached


def explain(row: dict[str, Any], remaining: list[Place], left: Iterable[Site]) -> None:
    """Counts the remaining activations by the report's reason, and names those that the report does not explain."""
    reasons = {place: explanation(place, left) for place in remaining}
    row["remaining"] = dict(Counter(reason for reason in reasons.values() if reason))
    row["unexplained"] = dict(Counter(str(place) for place, reason in reasons.items() if reason is None))


def rewritten(
    row: dict[str, Any], model: nn.Module, inputs: Inputs, before: dict[str, Any], report: RewriteReport
) -> None:
    """Records the activations that still run, and whether the gates run as before."""
    after = observe(model, inputs)
    family, formulas, _ = (after["eval"][i] | after["train"][i] for i in range(3))
    explain(row, [*family, *formulas], report.left)
    if "train_error" in after and "train_error" not in before:
        row["problems"].append(f"train after the rewrite: {after['train_error'][:200]}")
    changed = {}
    for mode in ("eval", "train"):
        was, now = before[mode][2], after[mode][2]
        changed |= {
            f"{place}, {place.module}, in {mode}": f"{was[place]} -> {now[place]}"
            for place in was | now
            if was[place] != now[place]
        }
    row["gates_changed"] = changed


def training(
    row: dict[str, Any],
    model: nn.Module,
    inputs: Inputs,
    expansions: Mapping[str, nn.Module],
    called: set[str],
    reached: set[str],
) -> None:
    """Runs a training step. Records reached expansions without a finite gradient, and called ones off its path."""
    seen_before = set(called)
    called.clear()
    reached.clear()
    try:
        backward(model, inputs)
    finally:
        trained = set(called)
        called |= seen_before
    missing, infinite = [], []
    for name in sorted(reached):
        gradients = [parameter.grad for parameter in expansions[name].parameters()]
        if any(gradient is None for gradient in gradients):
            missing.append(name)
        elif not all(gradient.isfinite().all() for gradient in gradients):
            infinite.append(name)
    row |= {"no_gradient": missing, "gradient_not_finite": infinite, "off_the_loss": sorted(trained - reached)}
    if infinite:
        raise OverflowError("gradients are not finite")
    model.eval()


def backward(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Runs forward and backward in train mode; returns the outputs. The loss is the mean square of their finite values.

    Raises:
        OverflowError: an output has no finite value, or the loss is out of range.
    """
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(1)
    outputs = [t for t in tensors(model(**inputs)) if t.is_floating_point() and t.requires_grad and t.numel()]
    if not outputs:
        raise ValueError("no output has a gradient")
    loss = torch.stack([t[t.isfinite()].square().mean() for t in outputs]).sum()  # NaN if one has no finite value
    if not loss.isfinite():
        raise OverflowError("the outputs or their squares are not finite")
    loss.backward()
    return outputs


def at_default(spec: Spec, model: nn.Module, inputs: Inputs) -> bool | str:
    """Whether all outputs and gradients are finite at a training step with the default expansion; if not, what is not.

    Values that are not finite in the model as it was, such as masked logits, do not count.
    """
    try:
        changed = copied(model, spec)
        rewrite_(changed, DEFAULT)
        found = not_finite(changed, inputs)
        if found:
            found -= not_finite(copied(model, spec), inputs)
    except Exception as error:
        return _short(error)
    return f"not finite: {', '.join(sorted(found))}"[:400] if found else True


def not_finite(model: nn.Module, inputs: Inputs) -> set[str]:
    """The outputs and the gradients of a training step that have a value that is not finite."""
    outputs = {f"output {i}": t for i, t in enumerate(backward(model, inputs))}
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name for name, t in (outputs | gradients).items() if not t.isfinite().all()}


def measure_default(spec: Spec) -> dict[str, Any]:
    """What `--default` adds to the row of a model."""
    return {"default_finite": at_default(spec, *build(spec))}


def training_clamped(row: dict[str, Any], model: nn.Module, inputs: Inputs) -> None:
    """Rewrites the model with clamped expansions and runs its training step."""
    rewrite_(model, CLAMPED)
    training(row, model, inputs, *watched(model))


def again(row: dict[str, Any], model: nn.Module) -> None:
    """Records how many sites a second rewrite replaces, and whether it changes any module."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    second = rewrite_(model, HERMITE)
    same = [(name, type(module)) for name, module in model.named_modules()] == modules
    row["second_rewrite"] = len(second.replaced) if same else "modules changed"


def fidelity(row: dict[str, Any], model: nn.Module, fitted: nn.Module, inputs: Inputs) -> None:
    """Records the relative error of the outputs after a rewrite with expansions fitted to the original functions."""
    report = rewrite_(fitted, FITTED, example_inputs=inputs)
    row["fitted"] = len(report.replaced)
    outputs = []
    for module in (model, model, fitted):
        torch.manual_seed(1)
        with torch.no_grad():
            outputs.append([t.double() for t in tensors(module.eval()(**inputs)) if t.is_floating_point()])
    reference, repeated, result = outputs
    error = _relative(reference, result)
    if not math.isfinite(error):
        raise ValueError("the fitted model's outputs are not finite")
    row["relative_error"] = error
    noise = _relative(reference, repeated)
    if noise:
        row["noise"] = noise


def _relative(reference: list[Tensor], result: list[Tensor]) -> float:
    if [t.shape for t in reference] != [t.shape for t in result]:
        raise ValueError("the outputs have other shapes")
    error = norm = 0.0
    for a, b in zip(reference, result, strict=True):
        finite = a.isfinite()
        error += float((a - b)[finite].square().sum())
        norm += float(a[finite].square().sum())
    if not norm:
        raise ValueError("the outputs of the model as it was are not finite, or all zero")
    return (error / norm) ** 0.5


def _short(error: Exception, length: int = 200) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:length]


Measure = Callable[[Spec], dict[str, Any]]


def serve(connection: Connection, group: list[Spec], measure: Measure) -> None:
    """Measures models in a process of their own and sends each row, without its empty fields."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for spec in group:
        start = time.perf_counter()
        row = measure(spec) | {"seconds": round(time.perf_counter() - start, 2)}
        connection.send((spec, {key: value for key, value in row.items() if value not in ([], {})}))


def measured(group: list[Spec], measure: Measure) -> Iterator[tuple[Spec, dict[str, Any]]]:
    """Yields the rows of one group from a child process, which is restarted after a model that hangs or kills it."""
    context = multiprocessing.get_context("fork")
    while group:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=serve, args=(sender, group, measure))
        process.start()
        sender.close()
        try:
            while group:
                if not receiver.poll(TIMEOUT):
                    yield group.pop(0), {"error": f"not measured: took more than {TIMEOUT} s"}
                    break
                yield receiver.recv()
                group.pop(0)
        except EOFError:
            process.join()
            yield group.pop(0), {"error": f"not measured: its process ended with code {process.exitcode}"}
        finally:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=("timm", "transformers"))
    parser.add_argument(
        "--only", default=["*"], nargs="+", metavar="PATTERN", help="names such as 'resnet*' or 'bert/*'"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="measure at most N models more")
    parser.add_argument("--again", action="store_true", help="measure those that are in the result file, too")
    parser.add_argument("--default", action="store_true", help="complete the rows of the file by the default expansion")
    parser.add_argument("--summary", action="store_true", help="only write the summary of the result file")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rows": []}
    if arguments.summary:
        write_summary(result, arguments.output)
        return
    import timm
    import transformers
    import transformers.modeling_utils  # here, because each process below would import it again

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    listed = {(spec.library, spec.name) for spec in specs()}
    rows = {key: row for row in result["rows"] if (key := (row["library"], row["name"])) in listed}
    if result.get("default") != str(DEFAULT):
        for row in rows.values():
            row.pop("default_finite", None)
    head = {
        "date": date.today().isoformat(),
        "hardware": f"one thread of a {platform.machine()} CPU",
        **{"torch": torch.__version__, "timm": timm.__version__, "transformers": transformers.__version__},
        "default": str(DEFAULT),
    }
    chosen = [s for s in specs() if arguments.library in (None, s.library)]
    chosen = [spec for spec in chosen if any(fnmatch.fnmatch(spec.name, pattern) for pattern in arguments.only)]
    if arguments.default:
        chosen = [spec for spec in chosen if sum(rows.get((spec.library, spec.name), {}).get("replaced", {}).values())]
    done = {key for key, row in rows.items() if not arguments.default or "default_finite" in row}
    chosen = [s for s in chosen if arguments.again or (s.library, s.name) not in done][: arguments.limit]
    for _, group in itertools.groupby(chosen, key=lambda spec: (spec.library, spec.group)):
        for spec, found in measured([*group], measure_default if arguments.default else measure):
            key = (spec.library, spec.name)
            if arguments.default:
                rows[key]["default_finite"] = found.get("error") or found["default_finite"]
                print(f"{spec.name}: {rows[key]['default_finite']}", flush=True)
            else:
                rows[key] = {"library": spec.library, "name": spec.name, **found}
                print(line(rows[key]), flush=True)
            save({**head, "rows": [*rows.values()]}, arguments.output)
    write_summary({**head, "rows": [*rows.values()]}, arguments.output)


def save(result: dict[str, Any], path: Path) -> None:
    """Writes one row a line: rows are many, and readers look at few of their fields."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"})
    ordered = sorted(result["rows"], key=lambda row: (row["library"], row["name"]))
    rows = ",\n".join(json.dumps(row) for row in ordered)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{head[:-1]}, "rows": [\n{rows}\n]}}\n')


def write_summary(result: dict[str, Any], path: Path) -> None:
    text = summary(result)
    path.with_suffix(".txt").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
