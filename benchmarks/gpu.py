"""Everything that a GPU can tell about ortho_fx, in eight minutes: right numbers, speed, memory, compilation.

    python benchmarks/gpu.py [--minutes 8] [--only PART ...] [--out FILE]
    python benchmarks/gpu.py --dry-run       # without a GPU: the parts in small on a CPU, eager, and the GPU's code

Parts, in order:

- numbers: every basis in float32, bfloat16 and float16, one expansion a layer, channel and group, compiled, against
  float64: tensors of 4096 x 3072, then the small cases of tests/ortho_fx/operators/kernel_cases.py
- activation: single activations, compared with compiled GELU: time, memory, kernels
- gpt2, convnext: training steps of GPT-2 124M and ConvNeXt-T under autocast to bfloat16, with CUDA graphs
  (mode="reduce-overhead"), compared with GELU, squared ReLU, SwiGLU (GPT-2), and Liger's PolyNorm and torchortho
  where they are installed
- compile: how long twelve blocks take to compile, with cold caches; a dry run has "code" instead, the numbers of
  kernels for an H100, generated without one

Each part gets its share of the time that is left. What does not fit is listed as skipped, and what fails with its
error; the others still run. The measurements are those of ortho_fx/bench and benchmarks/speed.py. Writes one JSON with
hardware and versions, results/gpu_<GPU>.json, after each part. Exits with 1 if a number is wrong or a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, rewrite_
from ortho_fx.bench.candidates import (
    Candidate,
    exchanged,
    make_candidates,
    trained_model,
    training_step,
)
from ortho_fx.bench.config import DEFAULT_EXPANSIONS, BenchConfig
from ortho_fx.bench.measure import bench, compile_seconds
from ortho_fx.models.stock import TORCHORTHO, SquaredReLU

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.speed import A_CHANNEL, HERMITE, RATIONAL, quick, sections

RESULTS = Path(__file__).parent / "results"
# The share of the time that each part may take of what is left when it begins, in units of those still to come.
WEIGHTS = {"numbers": 3, "activation": 2, "gpt2": 4, "convnext": 3, "compile": 2, "code": 1}
HERMITE_CHANNEL, RATIONAL_CHANNEL = (
    dataclasses.replace(expansion, granularity="channel") for expansion in (HERMITE, RATIONAL)
)
PACKAGES = ("torch", "triton", "torchortho", "liger-kernel")


class OutOfTime(Exception):
    """A measurement that is not begun, since its part has used its time."""


class Clock:
    """The time of a run, and of the part that is going on."""

    def __init__(self, minutes: float) -> None:
        # What is begun last takes up to a minute: the last tenth is for that.
        self.end = time.monotonic() + 0.9 * 60 * minutes
        self.deadline = self.end

    def begin(self, part: str, following: list[str]) -> None:
        now = time.monotonic()
        share = WEIGHTS[part] / (WEIGHTS[part] + sum(WEIGHTS[name] for name in following))
        self.deadline = now + share * max(0.0, self.end - now)

    def check(self) -> None:
        if time.monotonic() >= self.deadline:
            raise OutOfTime("no time was left")


class SwiGLU(nn.Module):
    """silu(a) * b of the two halves of the input."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return F.silu(first) * second


def poly_norm() -> nn.Module:
    return importlib.import_module("liger_kernel.transformers.poly_norm").LigerPolyNorm()


def torchortho(name: str, degree: int) -> nn.Module:
    return getattr(importlib.import_module("torchortho"), name)(degree)


# Each by name: what makes it, which may raise ImportError.
PEERS: dict[str, Callable[[], nn.Module]] = {
    "squared relu": SquaredReLU,
    "liger polynorm": poly_norm,
    **{
        f"torchortho {name.removesuffix('Activation').lower()} {degree}": lambda n=name, d=degree: torchortho(n, d)
        for name, degree in TORCHORTHO
    },
}


def installed_peers(result: dict[str, Any]) -> dict[str, nn.Module]:
    """One of each peer that is installed; the result lists the others as absent."""
    found = {}
    for name, make in PEERS.items():
        try:
            found[name] = make()
        except ImportError as error:
            result.setdefault("absent", {})[name] = str(error)
        except Exception as error:
            result.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
    return found


def numbers(clock: Clock, device: str, dry: bool) -> dict[str, Any]:
    from tests.ortho_fx.operators import kernel_cases

    cases = kernel_cases.cover()
    large = [
        kernel_cases.Case(kind, granularity, dtype, "large", "alone")
        for dtype in ("bfloat16", "float32", "float16")
        for granularity in ("layer", "channel", "group:3")
        for kind in kernel_cases.COMPILED
    ]
    if dry:
        # Without a compiler, what is around is rounded on its own.
        cases, large = [case for case in cases if case.around == "alone"][:2], []
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"rows": rows, "wrong": [], "skipped": [], "failed": {}}
    # Those of default shape first, then every pair of settings, then the other large ones.
    for case in [*large[:10], *cases, *large[10:]]:
        try:
            clock.check()
            torch.compiler.reset()
            problem = kernel_cases.problem_of(case)
            module = copy.deepcopy(problem.module).to(device)
            inputs = [x.detach().to(device).requires_grad_() for x in problem.inputs]
            symbolic = kernel_cases.SIZES[case.size].symbolic
            backend = "aot_eager" if dry else "inductor"
            y = torch.compile(module, fullgraph=True, dynamic=symbolic, backend=backend)(*inputs)
            wanted = [*inputs, *module.parameters()]
            gradients = torch.autograd.grad(y, wanted, problem.tangent.to(device))
            # In so many elements some lie at a kink, and have the slope of its other side.
            kinks = case.size == "large" and case.kind.startswith("tropical")
            outcome = kernel_cases.compare(on(device, problem), y.detach(), gradients, ignored=1e-5 if kinks else 0.0)
        except OutOfTime:
            result["skipped"].append(str(case))
            continue
        except Exception as error:
            result["failed"][str(case)] = f"{type(error).__name__}: {str(error)[:500]}"
            continue
        right = outcome.is_right(case)
        rows.append({"case": str(case), **outcome._asdict(), "right": right})
        if not right:
            result["wrong"].append(str(case))
    for name in ("output", "inputs", "parameters"):
        result[f"largest {name}"] = {
            dtype: max((row[name] for row in rows if f"-{dtype}-" in row["case"]), default=None)
            for dtype in ("float32", "bfloat16", "float16")
        }
    result["note"] = "errors in units of the dtype's precision"
    return result


def on(device: str, problem: Any) -> Any:
    """The same problem with all its tensors on the device, where float64 is quicker than on a CPU."""

    def moved(tensors: list[Tensor]) -> list[Tensor]:
        return [x.detach().to(device).requires_grad_() for x in tensors]

    return problem._replace(
        module=copy.deepcopy(problem.module).to(device),
        inputs=moved(problem.inputs),
        tangent=problem.tangent.to(device),
    )


def guarded(candidates: Iterator[Candidate], clock: Clock) -> Iterator[Candidate]:
    """The candidates, each of which may fail without ending the measurement, and is not begun after the deadline."""
    yield next(candidates)
    for candidate in candidates:
        (name, phase), *_ = candidate.phases.items()
        # `bench` records the error of a peer.
        kind = "floor" if candidate.kind == "floor" else "peer"
        phases = {**candidate.phases, name: begun_in_time(phase, clock)}
        yield dataclasses.replace(candidate, kind=kind, phases=phases)


def begun_in_time(phase: Callable[[Any], Any], clock: Clock) -> Callable[[Any], Any]:
    """The phase, whose first call raises OutOfTime after the deadline."""
    begun = False

    def guarded_phase(value: Any) -> Any:
        nonlocal begun
        if not begun:
            clock.check()
            begun = True
        return phase(value)

    return guarded_phase


def measured(config: BenchConfig, candidates: Iterator[Candidate], clock: Clock) -> dict[str, Any]:
    report = bench(config, lambda line: None, guarded(candidates, clock))
    print(report)
    result = report.to_dict()
    failed = {row["name"]: row["error"] for row in result["rows"] if row["error"] is not None}
    result["skipped"] = [name for name, error in failed.items() if error.startswith(OutOfTime.__name__)]
    result["failed"] = {name: error for name, error in failed.items() if name not in result["skipped"]}
    return result


def activation(clock: Clock, device: str, dry: bool) -> dict[str, Any]:
    settings = sections(device)["bfloat16"] | {"expansions": (*DEFAULT_EXPANSIONS, *A_CHANNEL), "rounds": 20}
    config = BenchConfig(**(quick(settings) | {"eager": True} if dry else settings | {"peers": False}))
    extra: dict[str, Any] = {}
    peers = installed_peers(extra)
    result = measured(config, make_candidates(config, peers), clock)
    return result | {key: {**result.get(key, {}), **value} for key, value in extra.items()}


def gpt2(clock: Clock, device: str, dry: bool) -> dict[str, Any]:
    return training("gpt2", clock, device, dry)


def convnext(clock: Clock, device: str, dry: bool) -> dict[str, Any]:
    return training("convnext", clock, device, dry)


def training(what: str, clock: Clock, device: str, dry: bool) -> dict[str, Any]:
    settings = sections(device)[what] | {"rounds": 10, "expansions": (HERMITE,)}
    # Graphs are for CUDA alone.
    settings = quick(settings) | {"eager": True} if dry else settings | {"mode": "reduce-overhead"}
    config = BenchConfig(**settings)
    extra: dict[str, Any] = {}
    result = measured(config, steps(config, installed_peers(extra), dry), clock)
    return result | {key: {**result.get(key, {}), **value} for key, value in extra.items()}


def steps(config: BenchConfig, peers: dict[str, nn.Module], dry: bool) -> Iterator[Candidate]:
    """Training steps with GELU, then those that matter most first."""
    model, inputs, targets = trained_model(config)

    def step(name: str, kind: str, changed: nn.Module) -> Candidate:
        return training_step(name, kind, changed, inputs, targets, config)

    def rewritten(expansion: ExpansionConfig) -> Candidate:
        changed = copy.deepcopy(model)
        rewrite_(changed, expansion, example_inputs=inputs)
        return step(str(expansion), "expansion", changed)

    def with_peer(name: str) -> Candidate:
        return step(name, "peer", exchanged(model, peers[name]).to(config.device))

    yield step("gelu", "reference", exchanged(model, nn.GELU()))
    yield rewritten(HERMITE)
    yield with_peer("squared relu")
    yield rewritten(HERMITE_CHANNEL)
    if config.what == "gpt2":
        changed = copy.deepcopy(model)
        use_swiglu(changed)
        yield step("swiglu", "peer", changed.to(config.device))
    if not dry:
        yield rewritten(RATIONAL)
        yield rewritten(RATIONAL_CHANNEL)
    for name in peers:
        if name != "squared relu":
            yield with_peer(name)


def use_swiglu(model: nn.Module) -> None:
    """Gives the MLPs of a GPT-2 the form of SwiGLU, with the same number of weights up to a multiple of 64."""
    for block in model.blocks:  # type: ignore[union-attr]
        width = block.mlp.expand.in_features
        hidden = max(64, 8 * width // 3 // 64 * 64)
        block.mlp.expand, block.mlp.act = nn.Linear(width, 2 * hidden), SwiGLU()
        block.mlp.projection = nn.Linear(hidden, width)


def compilation(clock: Clock, device: str, dry: bool) -> dict[str, Any]:
    blocks, config = 12, BenchConfig(**sections(device)["compile"])
    result: dict[str, Any] = {"blocks": blocks, "seconds": {}, "skipped": [], "failed": {}}
    chosen = {"gelu": None, **{str(e): e for e in (HERMITE, RATIONAL, HERMITE_CHANNEL, *DEFAULT_EXPANSIONS[1:])}}
    for name, expansion in chosen.items():
        try:
            clock.check()
            result["seconds"][name] = compile_seconds(expansion, config, blocks)
        except OutOfTime:
            result["skipped"].append(name)
        except Exception as error:
            result["failed"][name] = f"{type(error).__name__}: {str(error)[:500]}"
    reference = result["seconds"].get("gelu")
    result["ratios"] = {name: seconds / reference for name, seconds in result["seconds"].items()} if reference else {}
    return result


def code(clock: Clock, device: str, dry: bool) -> dict[str, Any]:
    """Kernels over the whole tensor, and others, for an H100."""
    from ortho_fx.activations.expansion import make_activation
    from tests.h100 import triton_code

    x = torch.empty(4096, 3072, dtype=torch.bfloat16, device="meta", requires_grad=True)
    result: dict[str, Any] = {"kernels": {}, "failed": {}, "skipped": []}
    for expansion in (HERMITE, HERMITE_CHANNEL, RATIONAL):
        try:
            clock.check()
            made = make_activation(expansion, channels=None if expansion.granularity == "layer" else 3072)
            generated = triton_code(made, x)
            result["kernels"][str(expansion)] = {
                direction: {"big": len(graph.big), "small": len(graph.small)}
                for direction, graph in (("forward", generated.forward), ("backward", generated.backward))
                if graph is not None
            }
        except OutOfTime:
            result["skipped"].append(str(expansion))
        except Exception as error:
            result["failed"][str(expansion)] = f"{type(error).__name__}: {str(error)[:500]}"
    return result


PARTS: dict[str, Callable[[Clock, str, bool], dict[str, Any]]] = {
    "numbers": numbers,
    "activation": activation,
    "gpt2": gpt2,
    "convnext": convnext,
    "compile": compilation,
    "code": code,
}


def environment(device: str) -> dict[str, Any]:
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "hardware": "CPU",
        "versions": versions | {"python": sys.version.split()[0], "cuda": torch.version.cuda},
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        found["hardware"] = properties.name
        found["memory_bytes"] = properties.total_memory
        found["capability"] = f"{properties.major}.{properties.minor}"
        with contextlib.suppress(Exception):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found


def run(parts: list[str], minutes: float, device: str, dry: bool, path: Path | None) -> dict[str, Any]:
    """The results of the parts, each with its status: "ok", "wrong", "failed" or "skipped"."""
    clock = Clock(minutes)
    results: dict[str, Any] = {**environment(device), "dry_run": dry, "minutes": minutes, "parts": {}}
    for number, part in enumerate(parts):
        clock.begin(part, parts[number + 1 :])
        start = time.monotonic()
        print(f"## {part}", flush=True)
        try:
            if time.monotonic() >= clock.end:
                raise OutOfTime("no time was left for this part")
            result = PARTS[part](clock, device, dry)
            status = "wrong" if result.get("wrong") else "failed" if result.get("failed") else "ok"
        except OutOfTime as error:
            result, status = {"error": str(error)}, "skipped"
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            status = "failed"
        torch.compiler.reset()
        if device != "cpu":
            torch.cuda.empty_cache()
        results["parts"][part] = {"status": status, "took_seconds": round(time.monotonic() - start, 1), **result}
        for kind in ("error", "wrong", "failed", "skipped", "absent"):
            if result.get(kind):
                print(f"{kind}: {result[kind]}")
        print(f"{part}: {status}, {results['parts'][part]['took_seconds']} s\n", flush=True)
        if path is not None:
            path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def parts_of(dry: bool) -> list[str]:
    return [name for name in PARTS if name != ("compile" if dry else "code")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="how long it may take (default 8)")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="the JSON (default results/gpu_<GPU>.json; a dry run writes none)")
    parser.add_argument("--dry-run", action="store_true", help="in small, without a GPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; --dry-run tries the script without one")
    device = "cpu" if options.dry_run else "cuda"
    parts = [name for name in parts_of(options.dry_run) if name in (options.only or PARTS)]
    path = options.out
    if path is None and not options.dry_run:
        name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower())
        path = RESULTS / f"gpu_{name}.json"
    results = run(parts, options.minutes, device, options.dry_run, path)
    statuses = {name: part["status"] for name, part in results["parts"].items()}
    print(", ".join(f"{name} {status}" for name, status in statuses.items()))
    if path is not None:
        print(f"written to {path}")
    return int(any(status in ("wrong", "failed") for status in statuses.values()))


if __name__ == "__main__":
    sys.exit(main())
