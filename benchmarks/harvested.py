"""What of a learned function's gain is left if other runs start from it, live or frozen: GPT-2 and ConvNeXt.

    python benchmarks/harvested.py [--only gpt2-small convnext-small-fashion gpt2] [--learn] [--jobs 2]

Two runs learn Fourier expansions of five terms. `ortho-fx harvest` takes the mean of what they learned, pruned to the
fewest terms within PRUNING of it. A comparison then trains three other seeds with GELU, with five terms that are
learned from the stable start, and with the harvested function, live and frozen, at equal steps and at equal time. The
smallest GPT-2 takes the function that GPT-2 small has learned, so it shows what that does at another size.

The functions come with the package (ortho_fx/presets); --learn makes them anew. Runs are kept in runs/harvested, and
go on there after an interruption. Writes results/harvested.json, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ortho_fx.models.compare.report import Comparison
from ortho_fx.models.compare.runs import Budget, compare
from ortho_fx.models.recipe import TASKS, TrainConfig, load_recipe
from ortho_fx.models.runs.files import read_run
from ortho_fx.numerics.preset import read_preset

RESULTS = Path(__file__).parent / "results"
PRESETS = Path(__file__).parent.parent / "ortho_fx" / "presets"
RUNS = Path("runs") / "harvested"
LEARNED, OTHERS = (0, 1), range(2, 5)
# The largest distance of the pruned function from the mean of those learned, as a share of its deviation.
PRUNING = 0.3
# Of all runs of both recipes.
LR = 4e-3
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


def learn(directory: Path, recipe: str, seed: int) -> None:
    """Trains with Fourier 5. A run that is complete is kept, and one that was interrupted goes on."""
    if not (directory / "model.safetensors").is_file():
        begun = any((directory / "checkpoints").glob("*")) if directory.is_dir() else False
        own = ["--basis", "fourier", "--degree", 5, "--lr", LR]
        ortho_fx("train", recipe, *own, "--seed", seed, "--out", directory, *(["--resume"] if begun else []))
    print(f"{directory}: {read_run(directory).validations[-1]['validation_loss']:.4f}", flush=True)


def harvest(recipe: str, jobs: int) -> None:
    """Learns the functions of a recipe, and writes their mean as a preset."""
    runs = [RUNS / recipe / f"learned-{seed}" for seed in LEARNED]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(learn, runs, [recipe] * len(runs), LEARNED))
    print(ortho_fx("harvest", *runs, "--out", PRESETS / f"{recipe}.json", "--error", PRUNING), end="", flush=True)


def compared(recipe: str, jobs: int) -> Comparison:
    """The comparison of GELU, Fourier 5 as it learns, and the harvested function, live and frozen."""
    preset = RECIPES[recipe]
    degree = read_preset(PRESETS / f"{preset}.json").expansion.degree
    ways = ["gelu", "fourier:5", *(f"fourier:{degree}{mark},init=preset:{preset}" for mark in ("", ":frozen"))]
    values = {"model": recipe} if recipe in TASKS else {**load_recipe(recipe), "lr": LR}
    config = TrainConfig.from_values({**values, "seed": OTHERS[0]})
    budget = Budget(len(OTHERS), jobs=jobs)
    return compare(config, ways, budget, RUNS / recipe / "compared", progress=lambda line: print(line, flush=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--learn", action="store_true", help="make the functions anew")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each on one thread (default 2)")
    options = parser.parse_args()
    path = RESULTS / "harvested.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for recipe in options.only:
        if options.learn and recipe == RECIPES[recipe]:
            harvest(recipe, options.jobs)
        comparison = compared(recipe, options.jobs)
        results[recipe] = {"functions_of": RECIPES[recipe], "comparison": comparison.to_dict()}
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(comparison, flush=True)


if __name__ == "__main__":
    main()
