"""The files of a checkpoint: written with a digest of each, and read without running a pickle.

The digest is XXH3-128 of the package xxhash, or SHA-256 without that package, which is some ten times slower. It is
there to find damage; see docs/security.md.

`torch.distributed.checkpoint` writes them. Its index, `.metadata`, is a pickle. `_Index` reads it, and makes only the
few classes that PyTorch puts there. The values beside the tensors are read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import stat
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ortho_fx.errors import OrthoFxError

try:
    from xxhash import xxh3_128
except ImportError:
    _HASHES: dict[str, Any] = {"sha256": hashlib.sha256}
else:
    _HASHES = {"xxh3_128": xxh3_128, "sha256": hashlib.sha256}

INDEX = ".metadata"
_HASH = next(iter(_HASHES))
# A block is hashed while it is in the processor's cache.
_BLOCK = 1 << 18
# What an index holds: classes of these modules, by their names in the file.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}
_LAYOUTS = {str(layout): layout for layout in vars(torch).values() if isinstance(layout, torch.layout)}


@dataclass(frozen=True)
class Digest:
    """The length of a file in bytes, and a hash of its content: the hash's name, and its hexadecimal digits."""

    size: int
    hash: str
    digits: str

    def to_json(self) -> dict[str, Any]:
        return {"size": self.size, self.hash: self.digits}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> Digest:
        """The digest that `to_json` described.

        Raises:
            ValueError: a description that has not one hash beside the size.
            ImportError: a hash of xxhash, which is not installed.
        """
        (name,) = described.keys() - {"size"}
        if name == "xxh3_128" and name not in _HASHES:
            raise ImportError("digests of xxhash: pip install xxhash")
        if name not in _HASHES:
            raise ValueError(f"{name!r} is no hash of a file")
        return cls(int(described["size"]), name, str(described[name]))


def write_tensors(folder: Path, state: Mapping[str, Any], alone: bool) -> dict[str, Digest]:
    """Writes this process' part of a state into an empty folder, flushed to the disk, and returns its files' digests.

    Every process has to call it, unless it is alone.
    """
    files, writer = _Files(), FileSystemWriter(folder)
    writer.fs = files
    with _plainly():
        save(dict(state), storage_writer=writer, no_dist=alone)
    return files.digests


def read_tensors(folder: Path, state: dict[str, Any], alone: bool) -> None:
    """Reads a state, in place, from the files in a folder. Every process has to call it, unless it is alone."""
    reader = _Reader(folder)
    with _plainly():
        load(state, storage_reader=reader, planner=_Planner(), no_dist=alone)


def digest_of(path: Path, hash: str = _HASH) -> Digest:
    """The digest of a regular file.

    Raises:
        OSError: a file that cannot be read, or that is something else, such as a pipe.
    """
    # A pipe would wait for its writer without O_NONBLOCK, which regular files ignore.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(0, "it is not a regular file")
        found, size, block = _HASHES[hash](), 0, memoryview(bytearray(_BLOCK))
        while count := file.readinto(block):
            found.update(block[:count])
            size += count
        return Digest(size, hash, found.hexdigest())


def difference(folder: Path, name: str, expected: Digest) -> str | None:
    """How a file in a folder differs from its digest; None if it does not."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{name} has {size:,} bytes instead of {expected.size:,}"
        return None if digest_of(path, expected.hash) == expected else f"the content of {name} has changed"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


class _Files(FileSystem):
    """Creates files that did not exist, and keeps their digests, by name."""

    def __init__(self) -> None:
        self.digests: dict[str, Digest] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        hashed = _Hashed(path)
        with io.BufferedWriter(hashed, _BLOCK) as stream:
            yield stream
        self.digests[Path(path).name] = Digest(hashed.size, _HASH, hashed.hash.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _Hashed(io.FileIO):
    """A new file that hashes what is written to it, below the buffer that gathers PyTorch's many small pieces."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # "x" fails where something stands already, a link too.
        super().__init__(os.fspath(path), "x")
        self.hash, self.size = _HASHES[_HASH](), 0

    def write(self, data: Any, /) -> int:
        # No more than a block: the buffer above comes back with the rest.
        block = memoryview(data)[:_BLOCK]
        written = super().write(block)
        self.hash.update(block[:written])
        self.size += written
        return written


class _Reader(FileSystemReader):
    """Reads an index without running it, and no file outside of the checkpoint's folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Here, since `load` logs a traceback for an index that cannot be read.
        with (folder / INDEX).open("rb") as file:
            metadata = _Index(file).load()
        if not isinstance(metadata, Metadata):
            raise OrthoFxError(f"{INDEX} holds a {type(metadata).__name__} and no index")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise OrthoFxError(
                    f"{INDEX} names {info.relative_path!r}, which is not in the folder of the checkpoint"
                )
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # PyTorch's method runs whatever pickle there is. It gets a file that holds the value alone.
        plain = torch.load(value, weights_only=True)
        copy = io.BytesIO()
        torch.save(plain, copy)
        copy.seek(0)
        super().load_bytes(read_item, copy)


class _Index(pickle.Unpickler):
    """Unpickles an index. Whatever else the pickle names is an error, before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return _stand_in(super().find_class(module, name))
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda layout: _LAYOUTS[layout]
        if (module, name) == ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"):
            encoding = super().find_class(module, name)
            return lambda number: encoding(number)
        if module in ("pathlib", "pathlib._local"):  # the folder in which the checkpoint was written; nothing reads it
            return lambda *parts: "/".join(parts)
        raise OrthoFxError(f"{INDEX} names {module}.{name}, which no index of a checkpoint holds")


def _stand_in(real: type) -> type:
    """A class whose instances are of another: a pickle can set attributes of the classes that it names."""
    return type(real.__name__, (), {"__new__": lambda cls: object.__new__(real)})


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """One process is meant, so no warning about it; and the error of a process in place of the report of all."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        failures = [failure[0] for failure in error.failures.values()]
        raise next((one for one in failures if isinstance(one, Exception)), RuntimeError(str(error))) from None
