"""What the programs of a kernel do to memory, for `tests.interpreter`.

`Memory` knows which elements of the buffers of a wrapper were written. Buffers that it did not allocate are inputs, so
all of their elements count as written. `Launch` sees every access of one launch and raises an AssertionError for

- an access outside of a tensor;
- a load of an element that nothing has written, or that was written for a buffer whose memory is used again;
- an element that two programs write, or that one writes and another reads: their order is not known. Atomic additions
  of several programs to an element are no fault, if no program stores or loads it in that launch;
- a store of two different values to one element;
- a store of another kind of number (an integer to floats), or of a number that was rounded to fewer bits than the
  memory has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NOBODY, _MANY, _ATOMIC = -1, -2, -3
_FRESH, _WRITTEN, _REUSED = 0, 1, 2


class Memory:
    """The memory of wrappers that run one after the other."""

    def __init__(self) -> None:
        # By address: the storage, which is kept alive so that no other gets its address, and the state of each byte.
        self._allocated: dict[int, tuple[Any, Tensor]] = {}

    def allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._allocated[storage.data_ptr()] = storage, torch.full((storage.nbytes(),), _FRESH, dtype=torch.uint8)

    def reuse(self, tensor: Tensor) -> None:
        """The memory of another buffer is this tensor's from now on. Only a kernel that works in place may read it."""
        self._set(tensor, _REUSED)

    def written(self, tensor: Tensor) -> None:
        """A library has written the tensor."""
        self._set(tensor, _WRITTEN)

    def states(self, tensor: Tensor) -> Tensor | None:
        """The state of each byte of the tensor's storage; None for memory from outside."""
        found = self._allocated.get(tensor.untyped_storage().data_ptr())
        return None if found is None else found[1]

    def unwritten(self, tensor: Tensor) -> int:
        """The number of elements that nothing has written."""
        states = self.states(tensor)
        return 0 if states is None else int((states[_bytes_of(tensor)] != _WRITTEN).sum())

    def _set(self, tensor: Tensor, state: int) -> None:
        states = self.states(tensor)
        if states is not None:
            states[_bytes_of(tensor).reshape(-1)] = state


def _bytes_of(tensor: Tensor) -> Tensor:
    """The place of the first byte of each element in the tensor's storage."""
    place = torch.tensor(tensor.storage_offset())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        place = place[..., None] + torch.arange(size) * stride
    return place * tensor.element_size()


class Target:
    """A tensor that a launch has as an argument, as the memory from its first to its last element."""

    def __init__(self, launch: Launch, name: str, tensor: Tensor) -> None:
        self.launch, self.name, self.dtype = launch, name, tensor.dtype
        spans = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.count = 1 + sum(spans) if tensor.numel() else 0
        self.elements = tensor.detach().as_strided((self.count,), (1,), tensor.storage_offset())
        self.first, self.itemsize = tensor.storage_offset() * tensor.element_size(), tensor.element_size()
        self.states = launch.memory.states(tensor)
        self.readers, self.writers = launch.programs_of(tensor)

    def places(self, offset: Any, mask: Any, beyond: bool = False) -> tuple[Tensor, Tensor]:
        """Positions, and which of them are accessed.

        With `beyond`, a single position may lie after the tensor's end; it is then not accessed.
        """
        offset = torch.as_tensor(offset, dtype=torch.int64)
        offset, meant = torch.broadcast_tensors(offset, torch.as_tensor(True if mask is None else mask))
        outside = meant & ((offset < 0) | (offset >= self.count))
        if outside.any():
            if beyond and offset.numel() == 1 and (offset >= self.count).all():
                return offset, meant & ~outside
            raise AssertionError(f"{self.name} has {self.count} elements, and {offset[outside].tolist()} are meant")
        return offset, meant

    def read_atomically(self, offset: Tensor) -> None:
        """An atomic addition reads what was there, but its order among others does not matter."""
        self._check_written(self.first + offset * self.itemsize, offset)

    def read(self, offset: Tensor) -> None:
        place = self.first + offset * self.itemsize
        self._check_written(place, offset)
        before, program = self.readers[place], self.launch.program
        self.readers[place] = torch.where((before == _NOBODY) | (before == program), program, _MANY).int()

    def _check_written(self, place: Tensor, offset: Tensor) -> None:
        if self.states is not None:
            # A kernel that works in place reads what the buffer held before.
            wrong = self.states[place] == _FRESH if "in_out" in self.name else self.states[place] != _WRITTEN
            assert not wrong.any(), (
                f"{self.launch.kernel} reads {self.name}{offset[wrong].tolist()}, which nothing wrote"
            )

    def write(self, offset: Tensor, atomic: bool = False) -> None:
        place = self.first + offset * self.itemsize
        before = self.writers[place]
        program = _ATOMIC if atomic else self.launch.program
        wrong = (before != _NOBODY) & (before != program)
        if wrong.any():
            others = sorted({self.launch.program, *(p for p in before[wrong].tolist() if p >= 0)})
            raise AssertionError(
                f"{self.launch.kernel}: programs {others} write {self.name}{offset[wrong].tolist()} in any order"
            )
        self.writers[place] = program
        if self.states is not None:
            self.states[place] = _WRITTEN

    def check_stored(self, offset: Tensor, values: Tensor) -> None:
        """Raises if values are of the wrong dtype, or if two of them differ for one position."""
        given, wanted = values.dtype, self.dtype
        same_kind = (given.is_floating_point, given == torch.bool) == (wanted.is_floating_point, wanted == torch.bool)
        fault = f"{self.launch.kernel} stores {given} to {self.name}, which is {wanted}"
        assert same_kind, fault
        assert given == wanted or given.itemsize >= max(wanted.itemsize, 4), fault
        order = offset.argsort()
        offset, values = offset[order], values[order]
        differ = (offset[1:] == offset[:-1]) & (values[1:] != values[:-1]) & (values[1:] == values[1:])
        assert not differ.any(), f"{self.launch.kernel} stores two values to {self.name}{offset[1:][differ].tolist()}"


class Launch:
    """One launch of a kernel: which program reads and writes which bytes."""

    def __init__(self, memory: Memory, kernel: str) -> None:
        self.memory, self.kernel, self.program = memory, kernel, 0
        self._programs: dict[int, tuple[Tensor, Tensor]] = {}

    def programs_of(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._programs:
            nobody = torch.full((2, storage.nbytes()), _NOBODY, dtype=torch.int32)
            self._programs[storage.data_ptr()] = nobody[0], nobody[1]
        return self._programs[storage.data_ptr()]

    def finish(self) -> None:
        """Raises if a program wrote what another read."""
        for readers, writers in self._programs.values():
            wrong = (writers != _NOBODY) & (readers != _NOBODY) & (readers != writers)
            assert not wrong.any(), (
                f"{self.kernel}: programs {writers[wrong].unique().tolist()} write what others read, in any order"
            )


def check_claims(
    kernel: str,
    values: dict[str, Any],
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible: Sequence[str],
    sizes: dict[str, int],
) -> None:
    """Raises if an argument is not what the kernel was compiled for.

    `divisible` are the parameters whose number or address is said to be a multiple of 16, `sizes` are numbers that the
    kernel's text has for parameters.
    """
    for name, value in values.items():
        if isinstance(value, Tensor):
            assert signature[name] == f"*{_TYPES[value.dtype]}", (
                f"{kernel}: {name} is {value.dtype}, and the signature says {signature[name]}"
            )
        elif signature[name] == "i32":
            assert -(2**31) <= value < 2**31, f"{kernel}: {name} is {value}, and the signature says i32"
    for name in divisible:
        if name in values:
            value = values[name]
            number = value.data_ptr() if isinstance(value, Tensor) else value
            assert number % 16 == 0, f"{kernel}: {name} is said to be a multiple of 16, and is not"
    for name, number in {**constants, **sizes}.items():
        if name in values:
            assert values[name] == number, f"{kernel}: {name} is {values[name]}, and the kernel has {number}"


_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
