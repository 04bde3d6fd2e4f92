"""Tells data of one size and other content apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.data.batch import Data
from ortho_fx.models.data.images import ImageFolder
from ortho_fx.models.data.text import TokenFile, Tokens

# Above this many bytes the data are sampled, since reading all would delay the start of a run by minutes.
WHOLE = 1 << 30
_SAMPLES, _BLOCK = 4096, 1 << 16


def data_digest(data: Data) -> str:
    """The SHA-256 of a data set's content, training and validation, in hexadecimal digits.

    Up to 1 GiB it is of all bytes. Of a larger file of tokens it is of 4,096 blocks of 64 KiB, spread evenly, and of a
    larger folder of images of 4,096 images and of all names.

    Raises:
        OrthoFxError: a file that cannot be read.
    """
    digest = hashlib.sha256(data.name.encode(errors="surrogateescape"))
    if isinstance(data, Tokens):
        for tokens in (data.train_tokens, data.validation_tokens):
            digest.update(_of_tokens(tokens))
    elif isinstance(data, ImageFolder):
        for split, files, labels in (
            ("train", data.train_files, data.train_labels),
            ("val", data.validation_files, data.validation_labels),
        ):
            digest.update(_of_images(data.root / split, files.tolist(), labels))
    else:
        # Whatever is in memory as arrays, in a fixed order.
        for name, value in sorted(vars(data).items()):
            if isinstance(value, np.ndarray):
                digest.update(name.encode() + _of_array(value))
    return digest.hexdigest()


def _of_array(values: NDArray[np.generic]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).digest()


def _of_tokens(tokens: NDArray[np.uint8] | TokenFile) -> bytes:
    if not isinstance(tokens, TokenFile):
        return _of_array(tokens)
    size = len(tokens) * tokens.dtype.itemsize
    starts = range(0, size, _BLOCK)
    if size > WHOLE:
        starts = np.linspace(0, size - _BLOCK, _SAMPLES).astype(np.int64).tolist()
    digest = hashlib.sha256()
    try:
        with tokens.path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_BLOCK))
    except OSError as error:
        raise OrthoFxError(f"cannot read {tokens.path}: {error.strerror}") from None
    return digest.digest()


def _of_images(folder: Path, files: Sequence[bytes], labels: NDArray[np.int64]) -> bytes:
    digest = hashlib.sha256(b"\0".join(files) + _of_array(labels))
    paths = [folder / os.fsdecode(file) for file in files]
    path = folder
    try:
        total = 0
        for path in paths:
            total += path.stat().st_size
            if total > WHOLE:
                paths = [paths[place] for place in np.linspace(0, len(paths) - 1, _SAMPLES).astype(int).tolist()]
                break
        for path in paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    except OSError as error:
        raise OrthoFxError(f"cannot read {path}: {error.strerror}") from None
    return digest.digest()
