"""Tokens: the source of Python's standard library, text files byte by byte, and prepared files of token ids.

A training batch has windows at random places. The validation has a fixed number of windows that do not overlap.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.data.batch import Batch

STANDARD_LIBRARY = "standard-library"
VALIDATION_SAMPLES = 320
# With fewer files than this, a validation of whole files would hold too much or too little of the text.
FEWEST_FILES_TO_SPLIT = 10


class TokenFile:
    """A file of token ids, read in parts. A pickle has the path and the length only.

    It is not mapped into memory: when a mapped file shrinks, the system ends the process that reads it.

    Args:
        path: a raw array of little-endian integers.
        dtype: "uint16" or "uint32".

    Raises:
        OrthoFxError: a file that cannot be read, or whose size is not a multiple of the integers' size.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype).newbyteorder("<")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise OrthoFxError(f"cannot read {path}: {error.strerror}") from None
        self._count, rest = divmod(size, self.dtype.itemsize)
        if rest:
            raise OrthoFxError(f"{path} must hold integers of {self.dtype.itemsize} bytes each; it has {size} bytes")
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: slice) -> NDArray[np.unsignedinteger[Any]]:
        start, stop, _ = places.indices(self._count)
        wanted, size = max(stop - start, 0), self.dtype.itemsize
        try:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)
            # Processes share a file's position after a fork, so none is used.
            content = os.pread(self._file.fileno(), wanted * size, start * size)
        except OSError as error:
            raise OrthoFxError(f"cannot read {self.path}: {error.strerror}") from None
        if len(content) != wanted * size:
            raise OrthoFxError(
                f"{self.path} changed while it was read: it held {self._count} tokens, and ends before token {stop} now"
            )
        return np.frombuffer(content, dtype=self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def __del__(self) -> None:
        if self.__dict__.get("_file") is not None:
            self._file.close()  # type: ignore[union-attr]


class Tokens:
    """Windows of `context` tokens; the target of each token is the token after it.

    A batch is inputs and targets, both (B, context) int64.

    Args:
        name: identifies the data (see `Data`).
        context: number of tokens in a window.
        train_tokens, validation_tokens: the tokens of each split.
        vocabulary: number of token ids; None if it is unknown.
        bytes_per_token: mean length of a validation token in bytes of text; None if it is unknown. The loss divided by
            it is in nats per byte, which is comparable between tokenizers.
        validation_samples: number of validation windows; fewer if the text does not hold as many.

    Raises:
        OrthoFxError: a split that is shorter than a window and the target of its last token.
    """

    kind: ClassVar[Literal["tokens"]] = "tokens"

    def __init__(
        self,
        name: str,
        context: int,
        train_tokens: NDArray[np.uint8] | TokenFile,
        validation_tokens: NDArray[np.uint8] | TokenFile,
        vocabulary: int | None,
        bytes_per_token: float | None,
        validation_samples: int = VALIDATION_SAMPLES,
    ) -> None:
        self.name, self.context, self.vocabulary, self.bytes_per_token = name, context, vocabulary, bytes_per_token
        self.train_tokens, self.validation_tokens = train_tokens, validation_tokens
        for split, tokens in (("training", train_tokens), ("validation", validation_tokens)):
            if len(tokens) < context + 1:
                raise OrthoFxError(
                    f"a window takes {context + 1} tokens, context and a target; {split} has {len(tokens)} ({name})"
                )
        last = len(validation_tokens) - context - 1
        windows = min(validation_samples, (len(validation_tokens) - 1) // context)
        self._held = np.linspace(0, last, windows).astype(np.int64)

    def batch(self, seed: int, step: int, size: int, rows: slice = slice(None)) -> Batch:
        places = len(self.train_tokens) - self.context
        return self._windows(self.train_tokens, np.random.default_rng((seed, step)).integers(places, size=size)[rows])

    def validation_batches(self, size: int) -> int:
        return -(-len(self._held) // size)

    def validation_batch(self, number: int, size: int, rows: slice = slice(None)) -> Batch:
        numbers = np.arange(number * size, (number + 1) * size)[rows]
        # The last batch is filled up with the last window; the targets -100 mark the filler.
        inputs, targets = self._windows(self.validation_tokens, self._held[numbers.clip(max=len(self._held) - 1)])
        targets[torch.from_numpy(numbers >= len(self._held))] = -100
        return inputs, targets

    def _windows(self, tokens: NDArray[np.uint8] | TokenFile, starts: NDArray[np.int64]) -> Batch:
        windows = np.empty((len(starts), self.context + 1), dtype=np.int64)
        for window, start in zip(windows, starts.tolist(), strict=True):
            window[:] = tokens[start : start + self.context + 1]
        largest = windows.max(initial=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise OrthoFxError(
                f"token ids must be below the vocabulary, {self.vocabulary}; got {largest} ({self.name})"
            )
        pairs = torch.from_numpy(windows)
        return pairs[:, :-1].contiguous(), pairs[:, 1:].contiguous()


class StandardLibrary(Tokens):
    """The source text of Python's standard library, byte by byte; every tenth file is for validation.

    A single cut through the text would put whole packages into one split.
    """

    def __init__(self, context: int, validation_samples: int = VALIDATION_SAMPLES) -> None:
        train, validation = _standard_library()
        name = f"standard library of Python {platform.python_version()}, {len(train) + len(validation)} bytes"
        super().__init__(name, context, train, validation, 256, 1.0, validation_samples)


class TextFiles(Tokens):
    """A text file or the text files of a folder, byte by byte and held in memory.

    Every tenth file is for validation; of fewer than ten files, the last tenth of each.

    Raises:
        OrthoFxError: a path that cannot be read, a folder without text files, or too little text.
    """

    def __init__(self, path: str | Path, context: int, validation_samples: int = VALIDATION_SAMPLES) -> None:
        files = text_files(path)
        train, validation = _concatenated(files)
        name = f"text of {len(files)} file{'s' * (len(files) > 1)}, {len(train)} train, {len(validation)} val"
        super().__init__(name, context, train, validation, 256, 1.0, validation_samples)


class TokenFiles(Tokens):
    """nanoGPT's train.bin and val.bin in one folder: token ids as raw little-endian uint16, without a header.

    `ortho-fx data` also writes a meta.json beside them, with the vocabulary, the dtype ("uint16" or "uint32"), the
    number of tokens in each file and the mean bytes of a token. The files are never read into memory as a whole.

    Raises:
        OrthoFxError: files that are missing, cut short or contradict meta.json; from `batch` and `validation_batch`, a
            token id that is not in the vocabulary.
    """

    def __init__(self, folder: str | Path, context: int, validation_samples: int = VALIDATION_SAMPLES) -> None:
        path = Path(folder) / "meta.json"
        meta: dict[str, Any] = _read_meta(path) if path.exists() else {"dtype": "uint16"}
        train, validation = (TokenFile(path.with_name(name), meta["dtype"]) for name in ("train.bin", "val.bin"))
        for key, tokens in (("train_tokens", train), ("validation_tokens", validation)):
            if meta.get(key, len(tokens)) != len(tokens):
                raise OrthoFxError(
                    f"{tokens.path} must hold {meta[key]} tokens, as {path} says; it holds {len(tokens)}"
                )
        super().__init__(
            f"tokens, {len(train)} train, {len(validation)} val",
            context,
            train,
            validation,
            meta.get("vocabulary"),
            meta.get("bytes_per_token"),
            validation_samples,
        )


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OrthoFxError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise OrthoFxError(f"{path} is not JSON: {error}") from None
    if not isinstance(meta, dict):
        raise OrthoFxError(f"{path} must be an object with vocabulary and dtype; got {type(meta).__name__}")
    vocabulary, dtype, size = meta.get("vocabulary"), meta.get("dtype"), meta.get("bytes_per_token", 1.0)
    if type(vocabulary) is not int or vocabulary < 1:
        raise OrthoFxError(f"vocabulary in {path} must be a whole number from 1 up; got {vocabulary!r}")
    if dtype not in ("uint16", "uint32"):
        raise OrthoFxError(f"dtype in {path} must be 'uint16' or 'uint32'; got {dtype!r}")
    if type(size) not in (int, float) or not 0 < size < math.inf:
        raise OrthoFxError(f"bytes_per_token in {path} must be a number above zero; got {size!r}")
    return meta


def text_files(source: str | Path) -> list[Path]:
    """The text files of a source, in the order of their names.

    Args:
        source: "standard-library", a file, or a folder, whose hidden, empty and binary files are left out. A file is
            binary if it has a zero byte in its first 8 KiB.

    Raises:
        OrthoFxError: a path that cannot be read, or without text.
    """
    if source == STANDARD_LIBRARY:
        return _standard_library_files()
    path = Path(source)
    files = list(find_text(path))
    if not files:
        what = "is empty or binary" if path.is_file() else "holds no text files" if path.is_dir() else "does not exist"
        raise OrthoFxError(f"text is read from a text file or a folder of text files; {path} {what}")
    return files


def find_text(path: Path) -> Iterator[Path]:
    """Yields the text files at a path, as they are found."""
    if path.is_file():
        found: Iterator[Path] = iter((path,))
    else:
        found = (file for file in _walk(path) if file.is_file())
    for file in found:
        try:
            with file.open("rb") as opened:
                start = opened.read(8192)
        except OSError as error:
            raise OrthoFxError(f"cannot read {file}: {error.strerror}") from None
        if start and b"\0" not in start:
            yield file


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


@functools.cache
def _standard_library() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return _concatenated(_standard_library_files())


def _standard_library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    files = [path for path in (*root.glob("*.py"), *root.glob("*/*.py")) if not left_out & set(path.parts)]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    if len(files) < 20:
        raise OrthoFxError(f"the source of Python's standard library is the training text, and {root} does not hold it")
    return files


def _concatenated(files: Sequence[Path]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bytes for training and for validation."""
    parts: tuple[list[bytes], list[bytes]] = [], []
    for number, path in enumerate(files):
        try:
            text = path.read_bytes()
        except OSError as error:
            raise OrthoFxError(f"cannot read {path}: {error.strerror}") from None
        if len(files) < FEWEST_FILES_TO_SPLIT:
            cut = len(text) * 9 // 10
            parts[0].append(text[:cut])
            parts[1].append(text[cut:])
        else:
            parts[number % 10 == 9].append(text)
    train, validation = (np.frombuffer(b"".join(part), dtype=np.uint8) for part in parts)
    return train, validation
