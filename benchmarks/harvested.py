"""What of a learned function's gain is left if other runs start from it, live or frozen: GPT-2 and ConvNeXt.

    python benchmarks/harvested.py [--only gpt2-small convnext-small-fashion gpt2] [--jobs 2]

Two runs learn Fourier expansions of five terms. `ortho-fx harvest` takes the mean of what they learned, pruned to the
fewest terms within PRUNING of it. Runs with three other seeds then train with GELU, with five terms that are learned
from the stable start, and with the harvested function, live and frozen. Everything goes through the command line. A
recipe without a function of its own takes the one that GPT-2 small has learned, so it shows what that does at another
size.

Runs are kept in runs/harvested, and go on there after an interruption. Writes results/harvested.json, and the presets
that come with the package (ortho_fx/presets); prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch

from ortho_fx.models.runs.files import read_run
from ortho_fx.numerics.preset import read_preset
from ortho_fx.tables import table

RESULTS = Path(__file__).parent / "results"
PRESETS = Path(__file__).parent.parent / "ortho_fx" / "presets"
RUNS = Path("runs") / "harvested"
LEARNED, OTHERS = (0, 1), (2, 3, 4)
# The largest distance of the pruned function from the mean of those learned, as a share of its deviation.
PRUNING = 0.3
# The recipe, and the one whose function it takes.
RECIPES = {"gpt2-small": "gpt2-small", "convnext-small-fashion": "convnext-small-fashion", "gpt2": "gpt2-small"}


def ortho_fx(*arguments: object) -> str:
    """Runs a command on one thread, and returns what it printed.

    Raises:
        SystemExit: it failed; with its message.
    """
    command = [sys.executable, "-m", "ortho_fx.cli", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:])}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def train(directory: Path, recipe: str, *settings: object) -> None:
    """A run that is complete is kept, and one that was interrupted goes on."""
    if not (directory / "model.safetensors").is_file():
        begun = any((directory / "checkpoints").glob("*")) if directory.is_dir() else False
        ortho_fx("train", recipe, *settings, "--out", directory, *(["--resume"] if begun else []))
    print(f"{directory}: {loss_of(directory):.4f}", flush=True)


def loss_of(directory: Path) -> float:
    return float(read_run(directory).validations[-1]["validation_loss"])


def preset_of(recipe: str) -> Path:
    return PRESETS / f"{recipe}.json"


def ways(recipe: str) -> dict[str, list[object]]:
    """The settings of each way to train."""
    preset = preset_of(RECIPES[recipe])
    degree = read_preset(preset).expansion.degree
    fourier = ["--basis", "fourier", "--degree"]
    return {
        "gelu": ["--basis", "none"],
        "fourier 5, learned": [*fourier, 5],
        "harvested, live": [*fourier, degree, "--init", f"preset:{preset}"],
        "harvested, frozen": [*fourier, degree, "--init", f"preset:{preset}", "--freeze"],
    }


def harvested(recipe: str, pool: ThreadPoolExecutor) -> None:
    """Learns the functions of a recipe, and writes their mean as a preset."""
    runs = [RUNS / recipe / f"learned-{seed}" for seed in LEARNED]
    started = [
        pool.submit(train, run, recipe, "--basis", "fourier", "--degree", 5, "--seed", seed)
        for run, seed in zip(runs, LEARNED, strict=True)
    ]
    for one in started:
        one.result()
    print(ortho_fx("harvest", *runs, "--out", preset_of(recipe), "--error", PRUNING), end="")


def measured(recipe: str, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    """The last validation losses in nats of every way to train, by seed."""
    started = {}
    for seed in OTHERS:
        for name, settings in ways(recipe).items():
            directory = RUNS / recipe / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            started[name, directory] = pool.submit(train, directory, recipe, *settings, "--seed", seed)
    losses: dict[str, list[float]] = {}
    for (name, directory), one in started.items():
        one.result()
        losses.setdefault(name, []).append(loss_of(directory))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each on one thread (default 2)")
    options = parser.parse_args()
    path = RESULTS / "harvested.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for recipe in options.only:
            if recipe == RECIPES[recipe]:
                harvested(recipe, pool)
            losses = measured(recipe, pool)
            results[recipe] = {
                "date": date.today().isoformat(),
                "torch": torch.__version__,
                "functions_of": RECIPES[recipe],
                "seeds": OTHERS,
                "validation_loss": losses,
            }
            path.write_text(json.dumps(results, indent=1) + "\n")
            rows = [["", *(f"seed {seed}" for seed in OTHERS), "mean", "minus gelu"]]
            for name, values in losses.items():
                gain = statistics.mean(values) - statistics.mean(losses["gelu"])
                rows.append([name, *(f"{v:.4f}" for v in values), f"{statistics.mean(values):.4f}", f"{gain:+.4f}"])
            print(f"{recipe}\n{table(rows, 'lr')}", flush=True)


if __name__ == "__main__":
    main()
