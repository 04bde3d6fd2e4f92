"""The machine code that Inductor and Triton make of the activations for an H100, read without one.

    python benchmarks/h100_code.py [--only hermite] [--case plain]

tests/h100.py generates the kernels, and tests/machine_code.py compiles them, which needs Triton (640 MB): PyTorch for
CUDA brings it, and beside a PyTorch for CPUs `pip install -e ".[gpu-code]"` installs it. Nothing runs, so these are
counts, not times.

Counted for the forward and the backward of every activation: kernels that touch a whole tensor, how often they load and
store one, and other kernels. Of the costliest kernel: registers of a thread; bytes of its stack, and instructions that
load or store there (spills, and the tables of the C library's sine); the share of an H100's threads that are resident
at once; and instructions for each element, in its loops, or in the whole kernel if it has none. Instructions are
counted in the text, so rarely executed code counts too (such as a library sine's path for huge arguments).

Writes results/h100_code.json and prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ortho_fx import ExpansionConfig
from ortho_fx.activations.expansion import make_activation
from ortho_fx.bases import BASES
from ortho_fx.operators import expand

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.h100 import PROPERTIES, Code, Graph, Kernel, triton_code
from tests.machine_code import compile_kernel

RESULT = Path(__file__).parent / "results" / "h100_code.json"
# GELU, the bases at their default degrees, and higher ones. "tied" ties the frequencies.
ACTIVATIONS: list[tuple[str, int, bool]] = [
    ("gelu", 0, False),
    ("hermite", 3, False),
    ("hermite", 8, False),
    ("hermite", 16, False),
    ("hermite", 32, False),
    ("fourier", 5, False),
    ("fourier", 5, True),
    ("tropical", 5, False),
    ("tropical_rational", 6, False),
]
FLAT, IMAGES = (4096, 3072), (32, 384, 14, 14)


class Case(NamedTuple):
    shape: tuple[int, ...]
    granularity: str = "layer"
    channel_dim: int = -1
    last: bool = False
    gate: bool = False


CASES = {
    "plain": Case(FLAT),
    "3-D": Case((32, 197, 3072)),
    "odd": Case((4099, 3071)),
    "small": Case((1024, 768)),
    "channels last": Case(IMAGES, last=True),
    "gate": Case(FLAT, gate=True),
    "channel": Case(IMAGES, "channel", 1),
    "channels side by side": Case(FLAT, "channel"),
    "group": Case(FLAT, "group:4"),
}
FLOATING_POINT = {"FFMA", "FADD", "FMUL", "FSEL", "FSETP", "FMNMX", "FSET", "FCHK", "MUFU"}


def code_of(basis: str, degree: int, tied: bool, case: Case, dtype: torch.dtype) -> Code:
    x = torch.empty(case.shape, dtype=dtype, device="meta")
    if case.last:
        x = x.to(memory_format=torch.channels_last)
    parameters: list[Tensor] = []
    if basis != "gelu":
        config = ExpansionConfig(basis, degree, granularity=case.granularity, tied=tied)
        grouped = case.granularity != "layer"
        made = make_activation(
            config,
            channels=case.shape[case.channel_dim] if grouped else None,
            channel_dim=case.channel_dim if grouped else None,
        )
        parameters = [getattr(made, parameter.name) for parameter in BASES[basis].parameters]
        channel_dim = case.channel_dim if grouped else 1

    def function(x: Tensor, *others: Tensor) -> Tensor:
        parameters = others[1:] if case.gate else others
        y = F.gelu(x) if basis == "gelu" else expand(BASES[basis], x, *parameters, channel_dim=channel_dim)
        return y * others[0] if case.gate else y

    gate = [torch.empty_like(x).requires_grad_()] if case.gate else []
    return triton_code(function, x.requires_grad_(), *gate, *parameters)


def machine_code(kernel: Kernel) -> dict[str, Any]:
    """The counts from a kernel's machine code."""
    code = compile_kernel(kernel)
    counted, elements = code.of_an_element()
    names = Counter(instruction.name for instruction in counted)

    def for_each_element(*chosen: str) -> float:
        return round(sum(names[name] for name in chosen or names) / elements, 1)

    return {
        "kernel": kernel.name,
        "kind": kernel.kind,
        "config": code.config,
        "configs": code.configs,
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "stack_instructions": sum(instruction.name in ("LDL", "STL") for instruction in code.instructions),
        "shared_bytes": code.shared_bytes,
        "occupancy": code.occupancy,
        "instructions": for_each_element(),
        "floating_point": for_each_element(*FLOATING_POINT),
        "special_function": for_each_element("MUFU"),
    }


def summary(graph: Graph) -> dict[str, Any]:
    compiled = {kernel.name: machine_code(kernel) for kernel in graph.kernels}
    return {
        "big": len(graph.big),
        "small": len(graph.small),
        "loads": sum(kernel.loads for kernel in graph.big),
        "stores": sum(kernel.stores for kernel in graph.big),
        "costliest": max((compiled[kernel.name] for kernel in graph.big), key=lambda code: code["instructions"]),
    }


def line(row: dict[str, Any], direction: str) -> str:
    graph = row[direction]
    code = graph["costliest"]
    stack = f"{code['stack_bytes']}/{code['stack_instructions']}"
    return (
        f"{row['activation']:19} {row['dtype']:8} {row['case']:21} {direction:8} "
        f"{graph['big']:3} {graph['small']:5} {graph['loads']:5} {graph['stores']:6} {code['registers']:9} {stack:>8} "
        f"{code['occupancy']:9} {code['instructions']:12} {code['floating_point']:5} {code['special_function']:4}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="activations whose name contains this; writes no result")
    parser.add_argument("--case", choices=CASES, help="one case; writes no result")
    arguments = parser.parse_args()

    header = f"{'activation':19} {'dtype':8} {'case':21} {'':8} big small loads stores registers    stack occupancy"
    print(f"{header} instructions float  sfu")
    rows = []
    for (basis, degree, tied), dtype, (title, case) in itertools.product(
        ACTIVATIONS, (torch.float32, torch.bfloat16), CASES.items()
    ):
        name = " ".join([basis, *[str(degree)] * (degree > 0), *["tied"] * tied])
        if (arguments.only and arguments.only not in name) or (arguments.case and arguments.case != title):
            continue
        code = code_of(basis, degree, tied, case, dtype)
        assert code.backward is not None
        row = {"activation": name, "dtype": str(dtype).removeprefix("torch."), "case": title, "shape": case.shape}
        row |= {"forward": summary(code.forward), "backward": summary(code.backward)}
        rows.append(row)
        print(line(row, "forward"), line(row, "backward"), sep="\n", flush=True)

    if arguments.only or arguments.case:
        return
    result = {
        "date": date.today().isoformat(),
        "device": f"none: compiled for {PROPERTIES.name}, sm_{PROPERTIES.major}{PROPERTIES.minor}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
