"""The machine code that Triton makes of a kernel for an H100, on a machine without one.

    code = compile_kernel(kernel)      # a kernel of `tests.h100`
    assert not code.stack_bytes

Needs Triton (`pip install -e ".[gpu-code]"`; PyTorch for CUDA brings it), whose compiler and disassembler need no GPU.
A kernel is compiled as Inductor would compile it before its first launch. If it then needs many registers, Inductor
also tries smaller blocks; these are not read.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import triton

from ortho_fx import torch_private
from tests.h100 import PROPERTIES, Kernel, h100


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    `stack_bytes` are bytes of a thread's stack: registers that did not suffice (spills), and tables of library
    functions. `config` are the block sizes, one of the `configs` that Inductor would try. `shared_bytes` is the shared
    memory of a block. `listing` is the disassembler's text.
    """

    kernel: Kernel
    config: dict[str, int]
    configs: int
    threads: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    listing: str

    @cached_property
    def instructions(self) -> list[Instruction]:
        return read_instructions(self.listing)

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's threads that can be resident; a warp gets registers in units of 256."""
        warps = self.threads // 32
        blocks = [
            PROPERTIES.max_threads_per_multi_processor // self.threads,
            PROPERTIES.regs_per_multiprocessor // (warps * -(-self.registers * 32 // 256) * 256),
            PROPERTIES.shared_memory_per_multiprocessor // (self.shared_bytes + 1024),
        ]
        return round(min(blocks) * self.threads / PROPERTIES.max_threads_per_multi_processor, 2)

    def of_an_element(self) -> tuple[list[Instruction], float]:
        """The instructions that treat elements, in loops if there are any, and how many elements a thread treats."""
        elements = math.prod(size for name, size in self.config.items() if name.endswith("BLOCK")) / self.threads
        looped = self.kernel.kind == "reduction"
        counted = loops(self.instructions) if looped else self.instructions
        if not counted:
            # The compiler has unrolled the whole loop, or a single block covers the axis.
            counted = self.instructions
            elements *= -(-self.kernel.numels["r0_"] // self.config["R0_BLOCK"])
        if self.kernel.kind == "persistent_reduction":
            # The block along the reduced axis is not in the config: it is the axis' length, up to a power of two.
            elements *= 1 << (self.kernel.numels["r0_"] - 1).bit_length()
        return counted, elements


def compile_kernel(kernel: Kernel) -> MachineCode:
    """The machine code for the first block sizes; of a reduction, for those with the fewest registers and no spills."""
    first = _compile(kernel, 0)
    if kernel.kind != "reduction":
        return first
    others = (_compile(kernel, number) for number in range(1, first.configs))
    return min([first, *others], key=lambda code: (code.stack_bytes, code.registers))


def _compile(kernel: Kernel, number: int) -> MachineCode:
    private = torch_private.load(torch_private.MACHINE_CODE)
    with h100(), without_driver():
        _, path = private.PyCodeCache.write(kernel.definition)
        autotuner = getattr(private.PyCodeCache.load_by_key_path(Path(path).stem, path), kernel.name)
        config = autotuner.configs[number]
        binary = autotuner._precompile_config(config).kernel
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        resources, listing = (disassemble(option, file) for option in ("-res-usage", "-sass"))
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", resources)
    assert usage is not None, resources
    registers, stack, _, local = map(int, usage.groups())
    return MachineCode(
        kernel=kernel,
        config={**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages},
        configs=len(autotuner.configs),
        threads=32 * binary.metadata.num_warps,
        registers=registers,
        stack_bytes=stack + local,
        shared_bytes=binary.metadata.shared,
        listing=listing,
    )


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
