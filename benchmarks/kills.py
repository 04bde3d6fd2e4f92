"""Commands that are killed at random moments and started again end as if they had not been killed.

    python benchmarks/kills.py [--seed 0] [--only KIND]

SIGKILL, 100 times: GPT-2 and ConvNeXt as one process and as two (FSDP2), `compare`, and `data`. A command is killed
several times in a row and then left to end. After each kill no checkpoint is lost: the newest is as far as it was, or
farther, and what is there is whole. At the end the files are compared with those of a run that was not killed: every
tensor of the weights and of the expansions, every row but for its times, the comparison, the tokens. Of two processes,
every second kill takes one alone; the other has to end by itself, in one line that says what is kept.

Processes are forked from this one, which has imported PyTorch, so that kills fall into the work and not into imports.
Writes results/kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import safetensors.torch
import sklearn.datasets  # noqa: F401  for its digits
import torch

from ortho_fx.cli import main as command_line
from ortho_fx.models.compare import runs as compare_runs  # noqa: F401
from ortho_fx.models.data import prepare  # noqa: F401
from ortho_fx.models.training import loop  # noqa: F401
from ortho_fx.models.training.checkpoint import checkpoints
from ortho_fx.models.training.stored import Digest, difference

RESULT = Path(__file__).parent / "results" / "kills.json"
_SETTINGS = ["--no-compile", "--batch-size", "4", "--save-every", "3", "--eval-every", "5", "--steps", "20"]
_GPT2 = ["train", "gpt2", "--data", "text.txt", "--dropout", "0.1", "--ema", "0.9", *_SETTINGS]
_CONVNEXT = ["train", "convnext", "--drop-path", "0.1", *_SETTINGS]
_COMPARE = ["compare", "convnext", "--activations", "gelu", "hermite:2", "--seeds", "1", "--no-timing", *_SETTINGS]
_DATA = ["data", "long.txt", "out", "--tokenizer", "bpe", "--vocabulary", "600"]


@dataclass(frozen=True)
class Kind:
    """A command, its number of processes, and how often it is killed, in chains of so many kills."""

    command: Sequence[str]
    kills: int
    processes: int = 1
    chain: int = 5


KINDS = {
    "gpt2, one process": Kind(_GPT2, 24),
    "gpt2, two processes": Kind([*_GPT2, "--parallel", "fsdp"], 16, 2, 4),
    "convnext, one process": Kind(_CONVNEXT, 24),
    "convnext, two processes": Kind([*_CONVNEXT, "--parallel", "fsdp"], 16, 2, 4),
    "compare": Kind(_COMPARE, 12, chain=6),
    "data": Kind(_DATA, 8, chain=2),
}


def started(command: Sequence[str], processes: int) -> list[int]:
    """Forks the processes of a command, with their output in files; as torchrun would, if there are several."""
    port = _free_port() if processes > 1 else 0
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{name}{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            code = command_line(list(command))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def finished(command: Sequence[str], processes: int) -> float:
    """Runs a command to its end, and returns its seconds."""
    began = time.perf_counter()
    codes = [os.waitpid(child, 0)[1] for child in started(command, processes)]
    if any(codes):
        raise AssertionError(f"{' '.join(command)} ended with {codes}: {Path('err0.log').read_text()}")
    return time.perf_counter() - began


def killed(command: Sequence[str], processes: int, after: float, one_alone: bool) -> bool:
    """Kills a command after so many seconds; false if it ended before."""
    children = started(command, processes)
    time.sleep(after)
    ended = [os.waitpid(child, os.WNOHANG)[0] for child in children]
    living = [child for child, gone in zip(children, ended, strict=True) if not gone]
    victims = living[: 1 if one_alone else None]
    for child in victims:
        os.kill(child, signal.SIGKILL)
    codes = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in victims}
    told = {child: _left(child) for child in living if child not in victims}
    hit = len(living) == processes and all(code == -signal.SIGKILL for code in codes.values())
    for rank, child in enumerate(children):
        if hit and child in told:
            said = Path(f"err{rank}.log").read_text().splitlines()
            ours = [line for line in said if line.startswith("ortho-fx: ")]
            ends = {2: 1, 143: 1, -signal.SIGTERM: 0}  # the last while the processes still join
            if ends.get(told[child]) != len(ours):
                raise AssertionError(f"the process that was left ended with {told[child]}: {said}")
    return hit


def _left(child: int) -> int:
    """The exit code of a process that has lost its partner: by itself, or after SIGTERM, which torchrun would send."""
    for sent in (False, True):
        if sent:
            os.kill(child, signal.SIGTERM)
        for _ in range(100):
            gone, status = os.waitpid(child, os.WNOHANG)
            if gone:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def newest(folder: Path) -> int:
    """The step of the newest checkpoint of a run, or 0; every checkpoint has to be whole."""
    found = checkpoints(folder / "checkpoints")
    for path in found:
        files = json.loads((path / "state.json").read_text())["files"]
        for name, digest in files.items():
            problem = difference(path, name, Digest.from_json(digest))
            if problem is not None:
                raise AssertionError(f"{path}: {problem}")
    return int(found[-1].name.removeprefix("step-")) if found else 0


def content(folder: Path) -> dict[str, Any]:
    """What a command has written, without times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "checkpoints" in path.parts or "tensorboard" in path.parts:
            continue
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
            found[name] = {key: (tensor.dtype, tensor.tolist()) for key, tensor in tensors.items()}
        elif path.suffix == ".jsonl":
            found[name] = [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name in ("compare.json", "meta.json"):
            found[name] = _without_times(json.loads(path.read_text()))
        elif path.suffix == ".bin":
            found[name] = path.read_bytes()
        elif path.name not in (".lock", "metrics.csv", "run.json", "tokenizer.json") and path.stem != "compare":
            found[name] = "a file that should not be there"
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(held) for key, held in value.items() if "seconds" not in key}
    return [_without_times(held) for held in value] if isinstance(value, list) else value


def replacing(out: Path) -> list[str]:
    """What `data` asks for if it was killed while its files took their places, or after that."""
    return ["--overwrite"] if (out / "meta.json").exists() else []


def campaign(kind: Kind, generator: random.Random, note: Callable[[str], None]) -> dict[str, Any]:
    """Kills one kind of command as often as it says; an AssertionError if anything is lost."""
    out = Path("whole")
    base = [argument if argument != "out" else str(out) for argument in kind.command]
    trains = kind.command[0] == "train"
    whole = finished([*base, "--out", str(out)] if "out" not in kind.command else base, kind.processes)
    expected, kills, ends, lost_one = content(out), 0, 0, 0
    while kills < kind.kills:
        out = Path("killed")
        shutil.rmtree(out, ignore_errors=True)
        command = [argument if argument != "out" else str(out) for argument in kind.command]
        command = [*command, "--out", str(out)] if "out" not in kind.command else command
        for _ in range(min(kind.chain, kind.kills - kills)):
            before = newest(out) if trains else 0
            resumed = [*command, "--resume"] if before else [*command, *replacing(out)]
            # A resumed run is shorter; whatever it has left, the moment falls into it.
            left = whole * (1 - 0.7 * before / 20) if trains else whole
            alone = kind.processes > 1 and kills % 2 == 1
            if not killed(resumed, kind.processes, generator.uniform(0.02, 0.98) * left, alone):
                break
            kills += 1
            lost_one += alone
            if trains and newest(out) < before:
                raise AssertionError(f"the checkpoint of step {before} is lost")
            note(f"{kills} of {kind.kills}, at step {newest(out) if trains else '?'}")
        resumed = [*command, "--resume"] if trains and newest(out) else [*command, *replacing(out)]
        finished(resumed, kind.processes)
        ends += 1
        found = content(out)
        if found != expected:
            different = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
            shown = "; ".join(f"{name}: {found.get(name)} and {expected.get(name)}"[:2000] for name in different)
            raise AssertionError(f"other than without a kill: {', '.join(different)}: {shown}")
    row = {"kills": kills, "runs_to_the_end": ends, "seconds_without_a_kill": round(whole, 2), "all_identical": True}
    return {**row, "kills_of_one_process_alone": lost_one} if kind.processes > 1 else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="one kind alone; writes no result")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    generator = random.Random(chosen.seed)
    began, rows = time.perf_counter(), {}
    for name, kind in KINDS.items():
        if chosen.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            Path("text.txt").write_text("".join(generator.choices("abcdefgh \n", k=60_000)))
            Path("long.txt").write_text("".join(f"{generator.random()} of {number}\n" for number in range(60_000)))
            rows[name] = campaign(kind, generator, lambda text, name=name: print(f"{name}: {text}", flush=True))
            os.chdir("/")
    result = {
        "date": date.today().isoformat(),
        "hardware": f"one thread a process of a {platform.machine()} CPU",
        "torch": torch.__version__,
        "seed": chosen.seed,
        "seconds": round(time.perf_counter() - began),
        "kills": sum(row["kills"] for row in rows.values()),
        "kinds": rows,
    }
    print(json.dumps(result, indent=1))
    if chosen.only is None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
