"""Data that needs no download: the source of Python's standard library, and scikit-learn's bundled digits.

A batch is a function of the seed and the step alone: a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import functools
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ortho_fx.errors import OrthoFxError

Batch = tuple[Tensor, Tensor]


class Data(Protocol):
    """Training batches by step, and the same validation batches at every call; pairs of inputs and targets.

    `name` tells data apart that differ: a run resumes on the data that it began with.
    """

    name: str

    def batch(self, seed: int, step: int, size: int) -> Batch: ...

    def validation(self, size: int) -> Iterator[Batch]: ...


class StandardLibrary:
    """The source text of Python's standard library, byte by byte: next-byte prediction over windows of `context`.

    Every tenth file is for validation: a cut through the concatenated text would put whole packages on one side.
    """

    def __init__(self, context: int, validation_batches: int = 20) -> None:
        self.context = context
        self.validation_batches = validation_batches
        self.train_bytes, self.validation_bytes = _standard_library()
        size = len(self.train_bytes) + len(self.validation_bytes)
        self.name = f"standard library of Python {platform.python_version()}, {size} bytes"

    def batch(self, seed: int, step: int, size: int) -> Batch:
        starts = np.random.default_rng((seed, step)).integers(len(self.train_bytes) - self.context, size=size)
        return self._windows(self.train_bytes, starts)

    def validation(self, size: int) -> Iterator[Batch]:
        last = len(self.validation_bytes) - self.context - 1
        starts = np.linspace(0, last, self.validation_batches * size).astype(np.int64)
        for chunk in starts.reshape(self.validation_batches, size):
            yield self._windows(self.validation_bytes, chunk)

    def _windows(self, text: NDArray[np.uint8], starts: NDArray[np.int64]) -> Batch:
        windows = torch.from_numpy(text[starts[:, None] + np.arange(self.context + 1)].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@functools.cache
def _standard_library() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    files = [path for path in (*root.glob("*.py"), *root.glob("*/*.py")) if not left_out & set(path.parts)]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    if len(files) < 20:
        raise OrthoFxError(f"the source of Python's standard library is the training text, and {root} does not hold it")
    parts = [
        b"".join(path.read_bytes() for i, path in enumerate(files) if (i % 10 == 9) == held) for held in (False, True)
    ]
    train, validation = (np.frombuffer(part, dtype=np.uint8) for part in parts)
    return train, validation


class Digits:
    """scikit-learn's bundled handwritten digits: 1,797 images of 8 x 8 pixels; every seventh is for validation.

    Training images are shifted by up to one pixel in each direction, with zeros moving in.
    """

    name = "digits of scikit-learn"

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise OrthoFxError("the digits come with scikit-learn: pip install 'ortho-fx[train]'") from None
        images, labels = load_digits(return_X_y=True)
        # Pixels run from 0 to 16; with this the training set has mean 0 and standard deviation 1.
        pixels = torch.from_numpy((images.reshape(-1, 1, 8, 8) - 4.9) / 6.0).float()
        held = torch.arange(len(pixels)) % 7 == 6
        targets = torch.from_numpy(labels).long()
        self.train_set = pixels[~held], targets[~held]
        self.validation_set = pixels[held], targets[held]

    def batch(self, seed: int, step: int, size: int) -> Batch:
        images, labels = self.train_set
        generator = np.random.default_rng((seed, step))
        chosen = torch.from_numpy(generator.integers(len(images), size=size))
        blank = float(images.min())
        padded = torch.nn.functional.pad(images[chosen], (1, 1, 1, 1), value=blank)
        shifts = generator.integers(0, 3, size=(size, 2))
        shifted = [image[:, i : i + 8, j : j + 8] for image, (i, j) in zip(padded, shifts, strict=True)]
        return torch.stack(shifted), labels[chosen]

    def validation(self, size: int) -> Iterator[Batch]:
        # Whole batches only: another shape would compile the model once more for the last images.
        images, labels = self.validation_set
        size = min(size, len(images))
        for start in range(0, len(images) - size + 1, size):
            yield images[start : start + size], labels[start : start + size]
