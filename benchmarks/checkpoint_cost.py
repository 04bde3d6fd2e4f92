"""What the digests of a checkpoint cost: time and size of a save, with them and without, in turns in one process.

    python benchmarks/checkpoint_cost.py [--rounds 15]

Without them is a plain save: `torch.distributed.checkpoint` into a folder, a `state.json`, and a rename.
States are those of AdamW for GPT-2 of 1.3 and of 30 million parameters. The ratio is the median over pairs of saves, in
alternating order. Writes results/checkpoint_cost.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.models.training.checkpoint import save_checkpoint
from ortho_fx.models.training.processes import Processes

RESULT = Path(__file__).parent / "results" / "checkpoint_cost.json"
_MODELS = {
    "1.3 million": GPT2Config(vocabulary=256, context=128, layers=6, heads=4, width=132),
    "30 million": GPT2Config(vocabulary=8192, context=256, layers=8, heads=8, width=512),
}


def state_of(config: GPT2Config) -> dict[str, Any]:
    """Weights and the two moments of each."""
    weights = dict(GPT2(config).named_parameters())
    moments = {name: {"exp_avg": p.detach() * 0.1, "exp_avg_sq": p.detach() ** 2} for name, p in weights.items()}
    return {"model": {name: p.detach() for name, p in weights.items()}, "optimizer": {"state": moments}}


def before(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """A save without digests."""
    path = folder / f"step-{step:08d}"
    partial = path.with_name(path.name + ".partial")
    partial.mkdir()
    save(state, storage_writer=FileSystemWriter(partial), no_dist=True)
    with (partial / "state.json").open("w") as file:
        file.write(json.dumps({"version": 2, "step": step}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    return path


def after(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """A save of the trainer."""
    return save_checkpoint(folder, step, state, {}, Processes(0, 1, torch.device("cpu")), keep=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    rows = {}
    for name, config in _MODELS.items():
        state = state_of(config)
        times: dict[str, list[float]] = {"before": [], "after": []}
        sizes = {}
        with tempfile.TemporaryDirectory() as temporary:
            for turn in range(-2, rounds):  # the first two warm up
                kinds = [("before", before), ("after", after)]
                for kind, write in kinds if turn % 2 else reversed(kinds):
                    folder = Path(temporary, kind)
                    folder.mkdir()
                    os.sync()
                    began = time.perf_counter()
                    path = write(folder, 1, state)
                    times[kind].append(time.perf_counter() - began)
                    sizes[kind] = sum(file.stat().st_size for file in path.iterdir())
                    shutil.rmtree(folder)
        pairs = [later / earlier for earlier, later in zip(times["before"][2:], times["after"][2:], strict=True)]
        rows[name] = {
            "seconds_before": statistics.median(times["before"][2:]),
            "seconds_after": statistics.median(times["after"][2:]),
            "time_ratio": statistics.median(pairs),
            "bytes_before": sizes["before"],
            "bytes_after": sizes["after"],
            "size_ratio": sizes["after"] / sizes["before"],
        }
        row = rows[name]
        print(
            f"{name:12} {row['seconds_before']:.3f} s before, {row['time_ratio']:.3f} of the time with digests, "
            f"{row['size_ratio']:.4f} of the size"
        )
    result = {
        "date": date.today().isoformat(),
        "hardware": f"one thread of a {platform.machine()} CPU",
        "torch": torch.__version__,
        "rounds": rounds,
        "models": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
