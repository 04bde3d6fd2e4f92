"""The machine code that Inductor and Triton make of the activations for an H100, read without one.

    python benchmarks/h100_code.py [--only hermite] [--case plain]

Needs `pip install triton` (640 MB), whose compiler and disassembler need no GPU. tests/h100.py generates the kernels.
Each is compiled as Inductor would compile it before its first launch, and its instructions are read. Nothing runs, so
these are counts, not times.

Counted for the forward and the backward of every activation: kernels that touch a whole tensor, how often they load and
store one, and other kernels. Of the costliest kernel: registers of a thread; bytes of its stack, and instructions that
load or store there (spills, and the tables of the C library's sine); the share of an H100's threads that are resident
at once; and instructions for each element, in its loops, or in the whole kernel if it has none. Instructions are
counted in the text, so rarely executed code counts too (such as a library sine's path for huge arguments). If a kernel
needs many registers, Inductor also tries smaller blocks at its first launch; these are not read.

Writes results/h100_code.json and prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ortho_fx import ExpansionConfig, torch_private
from ortho_fx.activations.expansion import make_activation
from ortho_fx.bases import BASES
from ortho_fx.operators import expand

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.h100 import PROPERTIES, Graph, Kernel, h100, triton_code

RESULT = Path(__file__).parent / "results" / "h100_code.json"
ACTIVATIONS = [
    ("gelu", 0),
    ("hermite", 3),
    ("hermite", 8),
    ("hermite", 16),
    ("fourier", 5),
    ("tropical", 5),
    ("tropical_rational", 6),
]
# Shapes of the input; "gate" and "channel" change the function instead.
CASES = {
    "plain": (4096, 3072),
    "3-D": (32, 197, 3072),
    "odd": (4099, 3071),
    "channels last": (32, 384, 14, 14),
    "gate": (4096, 3072),
    "channel": (32, 384, 14, 14),
}
FLOATING_POINT = {"FFMA", "FADD", "FMUL", "FSEL", "FSETP", "FMNMX", "FSET", "FCHK", "MUFU"}


def code_of(basis: str, degree: int, case: str, dtype: torch.dtype) -> tuple[Graph, Graph]:
    """The forward and the backward graph."""
    shape = CASES[case]
    x = torch.empty(shape, dtype=dtype, device="meta")
    if case == "channels last":
        x = x.to(memory_format=torch.channels_last)
    parameters = []
    if basis != "gelu":
        activation = make_activation(ExpansionConfig(basis, degree))
        parameters = [getattr(activation, parameter.name) for parameter in BASES[basis].parameters]
        if case == "channel":
            parameters = [p.detach()[:, None].repeat(1, shape[1]).requires_grad_(p.requires_grad) for p in parameters]

    def function(x: Tensor, *others: Tensor) -> Tensor:
        parameters = others[1:] if case == "gate" else others
        y = F.gelu(x) if basis == "gelu" else expand(BASES[basis], x, *parameters)
        return y * others[0] if case == "gate" else y

    gate = [torch.empty_like(x).requires_grad_()] if case == "gate" else []
    code = triton_code(function, x.requires_grad_(), *gate, *parameters)
    assert code.backward is not None
    return code.forward, code.backward


def machine_code(kernel: Kernel) -> dict[str, Any]:
    """The counts from a kernel's machine code, for the first configuration that Inductor would try."""
    private = torch_private.load(torch_private.MACHINE_CODE)
    with h100(), without_driver():
        _, path = private.PyCodeCache.write(kernel.definition)
        autotuner = getattr(private.PyCodeCache.load_by_key_path(Path(path).stem, path), kernel.name)
        config = autotuner.configs[0]
        binary = autotuner._precompile_config(config).kernel
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        resources = disassemble("-res-usage", file)
        instructions = read_instructions(disassemble("-sass", file))

    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", resources)
    assert usage is not None, resources
    registers, stack, _, local = map(int, usage.groups())
    threads = 32 * binary.metadata.num_warps
    elements = math.prod(size for name, size in config.kwargs.items() if name.endswith("BLOCK")) / threads
    counted = loops(instructions) if kernel.kind == "reduction" else instructions
    if not counted:
        # The compiler has unrolled the whole loop, or a single block covers the axis.
        counted = instructions
        elements *= -(-kernel.numels["r0_"] // config.kwargs["R0_BLOCK"])
    if kernel.kind == "persistent_reduction":
        # The block along the reduced axis is not in the config: it is the length of the axis, up to a power of two.
        elements *= 1 << (kernel.numels["r0_"] - 1).bit_length()

    names = Counter(instruction.name for instruction in counted)

    def for_each_element(*chosen: str) -> float:
        return round(sum(names[name] for name in chosen or names) / elements, 1)

    return {
        "kernel": kernel.name,
        "kind": kernel.kind,
        "config": {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages},
        "configs": len(autotuner.configs),
        "registers": registers,
        "stack_bytes": stack + local,
        "stack_instructions": sum(instruction.name in ("LDL", "STL") for instruction in instructions),
        "shared_bytes": binary.metadata.shared,
        "occupancy": occupancy(registers, threads, binary.metadata.shared),
        "instructions": for_each_element(),
        "floating_point": for_each_element(*FLOATING_POINT),
        "special_function": for_each_element("MUFU"),
    }


@contextlib.contextmanager
def without_driver() -> Iterator[None]:
    """Compiles without a device's driver, which Inductor would set up for launches."""
    private = torch_private.load(torch_private.MACHINE_CODE)
    with (
        mock.patch.object(private.triton_helpers, "set_driver_to_gpu", return_value=None),
        mock.patch.object(private.StaticTritonCompileResult, "can_statically_launch", return_value=None),
    ):
        yield


def disassemble(option: str, file: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Instruction(NamedTuple):
    address: int
    name: str
    branch_target: int | None


def read_instructions(text: str) -> list[Instruction]:
    """The instructions of a kernel, without the endless loop and the padding after its end."""
    instructions = []
    for address, name, operands in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)([^;]*);", text):
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        instruction = Instruction(int(address, 16), name, int(target[1], 16) if target else None)
        if name != "NOP" and instruction.branch_target != instruction.address:
            instructions.append(instruction)
    return instructions


def loops(instructions: list[Instruction]) -> list[Instruction]:
    """The instructions that are inside a loop."""
    spans = [(i.branch_target, i.address) for i in instructions if i.branch_target and i.branch_target < i.address]
    return [i for i in instructions if any(start <= i.address <= end for start, end in spans)]


def occupancy(registers: int, threads: int, shared: int) -> float:
    """The share of a multiprocessor's threads that can be resident; a warp gets registers in units of 256."""
    warps = threads // 32
    blocks = [
        PROPERTIES.max_threads_per_multi_processor // threads,
        PROPERTIES.regs_per_multiprocessor // (warps * -(-registers * 32 // 256) * 256),
        PROPERTIES.shared_memory_per_multiprocessor // (shared + 1024),
    ]
    return round(min(blocks) * threads / PROPERTIES.max_threads_per_multi_processor, 2)


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
        f"{row['activation']:19} {row['dtype']:8} {row['case']:13} {direction:8} "
        f"{graph['big']:3} {graph['small']:5} {graph['loads']:5} {graph['stores']:6} {code['registers']:9} {stack:>8} "
        f"{code['occupancy']:9} {code['instructions']:12} {code['floating_point']:5} {code['special_function']:4}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="activations whose name contains this; writes no result")
    parser.add_argument("--case", choices=CASES, help="one case; writes no result")
    arguments = parser.parse_args()

    header = f"{'activation':19} {'dtype':8} {'case':13} {'':8} big small loads stores registers    stack occupancy"
    print(f"{header} instructions float  sfu")
    rows = []
    for (basis, degree), dtype, case in itertools.product(ACTIVATIONS, (torch.float32, torch.bfloat16), CASES):
        name = f"{basis} {degree}" if degree else basis
        if (arguments.only and arguments.only not in name) or (arguments.case and arguments.case != case):
            continue
        forward, backward = code_of(basis, degree, case, dtype)
        row = {"activation": name, "dtype": str(dtype).removeprefix("torch."), "case": case, "shape": CASES[case]}
        row |= {"forward": summary(forward), "backward": summary(backward)}
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
