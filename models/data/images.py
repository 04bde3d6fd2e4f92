"""Images: scikit-learn's digits, IDX files (the MNIST family), and folders of images by class.

Each epoch shows every training image once, in a new order; a batch may end one epoch and begin the next.
"""

from __future__ import annotations

import functools
import gzip
import math
import os
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import reason
from ortho_fx.memory import require_memory
from ortho_fx.models.data.augment import RandAugment, central_crop, mix, random_crop, row_generator, shift
from ortho_fx.models.data.batch import Batch

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow's decoders for these; it has others, for formats that few read and few test.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Pixels of an image; a small file can promise many more than memory holds.
_LARGEST = 2**27
# The 256 values of a pixel normalised by ImageNet's mean and standard deviation: (channels, 256).
_NORMALISED = (
    (np.arange(256) / 255 - np.array([[0.485], [0.456], [0.406]])) / np.array([[0.229], [0.224], [0.225]])
).astype(np.float32)


@dataclass(frozen=True)
class Settings:
    """Settings of data of images.

    Args:
        augment: one of the `augments` of the data; None for the first of them.
        mixup, cutmix: alpha of each; 0 turns it off.
        validation_samples: number of validation images, spread over the set; None for all.
    """

    augment: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    validation_samples: int | None = None


class Images(ABC):
    """A training and a validation set of images with their classes.

    A batch is normalised images (B, channels, image_size, image_size) float32 and labels (B,) int64. With mixup or
    cutmix, a training batch has targets (B, classes) float32 instead of labels.

    Args:
        name: identifies the data (see `Data`).
        train_labels, validation_labels: class of each image, int64.
        settings: augmentation, and size of the validation.
        channels, classes, image_size: of the images.

    Raises:
        OrthoFxError: an augmentation that these images do not support.
    """

    kind: ClassVar[Literal["images"]] = "images"
    augments: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        name: str,
        train_labels: NDArray[np.int64],
        validation_labels: NDArray[np.int64],
        settings: Settings,
        *,
        channels: int,
        classes: int,
        image_size: int,
    ) -> None:
        self.name = name
        self.train_labels, self.validation_labels = train_labels, validation_labels
        self.channels, self.classes, self.image_size = channels, classes, image_size
        self.augment = settings.augment or self.augments[0]
        if self.augment not in self.augments:
            raise OrthoFxError(f"augment of {name} must be one of {', '.join(self.augments)}; got {self.augment!r}")
        self.mixup, self.cutmix = settings.mixup, settings.cutmix
        count = len(validation_labels)
        self._held = np.linspace(0, count - 1, min(settings.validation_samples or count, count)).astype(np.int64)

    def batch(self, seed: int, step: int, size: int, rows: slice = slice(None)) -> Batch:
        numbers = range(size)[rows]
        chosen = epoch_order(len(self.train_labels), seed, step * size + np.array(numbers, dtype=np.int64))
        images, labels = self._training_images(chosen, seed, step, numbers), torch.from_numpy(self.train_labels[chosen])
        if self.mixup or self.cutmix:
            mixing = (self.classes, self.mixup, self.cutmix)
            return mix(images, labels, *mixing, seed=seed, step=step, rows=numbers)
        return images, labels

    def validation_batches(self, size: int) -> int:
        return -(-len(self._held) // size)

    def validation_batch(self, number: int, size: int, rows: slice = slice(None)) -> Batch:
        numbers = np.arange(number * size, (number + 1) * size)[rows]
        # The last batch is filled up with the last image; the target -100 marks the filler.
        chosen = self._held[numbers.clip(max=len(self._held) - 1)]
        labels = np.where(numbers < len(self._held), self.validation_labels[chosen], -100)
        return self._validation_images(chosen), torch.from_numpy(labels)

    @abstractmethod
    def _training_images(self, chosen: NDArray[np.int64], seed: int, step: int, rows: range) -> Tensor: ...

    @abstractmethod
    def _validation_images(self, chosen: NDArray[np.int64]) -> Tensor: ...


def epoch_order(count: int, seed: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the samples at these positions of a run; each epoch of the run goes through all `count` samples."""
    epochs, places = positions // count, positions % count
    chosen = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen[epochs == epoch] = _permutation(count, seed, int(epoch))[places[epochs == epoch]]
    return chosen


@functools.lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True)
class _Split:
    """The training or the validation images: pixels (N, channels, size, size), and the class of each image (N,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


class _InMemory(Images):
    """Images in memory as integers (N, channels, size, size), normalised batch by batch; zero is the background."""

    largest_shift: ClassVar[int]

    def __init__(self, name: str, train: _Split, validation: _Split, settings: Settings) -> None:
        self.train_pixels, self.validation_pixels = train.pixels, validation.pixels
        channels, size = train.pixels.shape[1:3]
        super().__init__(
            name,
            train.labels,
            validation.labels,
            settings,
            channels=channels,
            classes=int(train.labels.max()) + 1,
            image_size=size,
        )
        counts = np.zeros(256)
        for chunk in np.array_split(self.train_pixels, math.ceil(len(self.train_pixels) / 1000)):
            counts += np.bincount(chunk.ravel(), minlength=256)
        values = np.arange(256)
        self.mean = float(counts @ values / counts.sum())
        self.std = float(np.sqrt(counts @ (values - self.mean) ** 2 / counts.sum()))

    def _training_images(self, chosen: NDArray[np.int64], seed: int, step: int, rows: range) -> Tensor:
        pixels = self.train_pixels[chosen]
        if self.augment != "none":
            flip = self.augment == "flip"
            pixels = shift(pixels, self.largest_shift, flip=flip, seed=seed, step=step, rows=rows)
        return self._normalised(pixels)

    def _validation_images(self, chosen: NDArray[np.int64]) -> Tensor:
        return self._normalised(self.validation_pixels[chosen])

    def _normalised(self, pixels: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy((pixels.astype(np.float32) - np.float32(self.mean)) / np.float32(self.std))


class Digits(_InMemory):
    """scikit-learn's bundled handwritten digits: 1,797 images of 8 x 8 pixels; every seventh is for validation.

    Augmentation: "light" (the default), shifts by up to one pixel in each direction; "none".
    """

    augments = ("light", "none")
    largest_shift = 1

    def __init__(self, settings: Settings = Settings()) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise OrthoFxError("the digits come with scikit-learn: pip install scikit-learn") from None
        images, targets = load_digits(return_X_y=True)
        pixels, labels = images.reshape(-1, 1, 8, 8).astype(np.uint8), targets.astype(np.int64)
        held = np.arange(len(pixels)) % 7 == 6
        train, validation = (_Split(pixels[part], labels[part]) for part in (~held, held))
        super().__init__("digits of scikit-learn", train, validation, settings)


class IDX(_InMemory):
    """Grey images in the four IDX files of the MNIST family, gzipped or not, in one folder.

    The files are train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte,
    each also with .gz. Format: http://yann.lecun.com/exdb/mnist. Images are normalised by mean and standard deviation
    of the training set.

    Augmentation: "light" (the default), shifts by up to two pixels in each direction; "flip", the same with half of
    the images mirrored; "none".

    Raises:
        OrthoFxError: a file that is missing, not IDX or cut short, or files that do not fit together.
    """

    augments = ("light", "flip", "none")
    largest_shift = 2

    def __init__(self, folder: str | Path, settings: Settings = Settings()) -> None:
        train, validation = (_read_split(Path(folder), split) for split in ("train", "t10k"))
        if validation.pixels.shape[1:] != train.pixels.shape[1:]:
            sides = " and ".join("{} x {}".format(*part.pixels.shape[2:]) for part in (train, validation))
            raise OrthoFxError(f"images of {folder} must have one size; training and validation have {sides}")
        if validation.labels.max() > train.labels.max():
            largest = [int(part.labels.max()) for part in (train, validation)]
            raise OrthoFxError(
                f"labels of {folder} go up to {largest[0]} in training and to {largest[1]} in validation"
            )
        checksum = 0
        for part in (train, validation):
            checksum = zlib.crc32(part.labels.data, zlib.crc32(part.pixels.data, checksum))
        size, counts = train.pixels.shape[2], f"{len(train.labels)} train, {len(validation.labels)} val"
        super().__init__(
            f"images {size} x {size}, {counts}, crc32 {checksum:08x}",
            train,
            validation,
            settings,
        )


def _read_split(folder: Path, split: str) -> _Split:
    images = _read_idx(folder / f"{split}-images-idx3-ubyte", 3)
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise OrthoFxError(f"{folder} has {len(images)} {split} images and {len(labels)} {split} labels")
    if images.shape[1] != images.shape[2] or not images.size:
        shape = " x ".join(map(str, images.shape))
        raise OrthoFxError(f"{split} images of {folder} must be square, and one or more; got {shape}")
    return _Split(images[:, None], labels.astype(np.int64))


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of an IDX file of bytes with this number of dimensions, from the file itself or from its .gz."""
    packed = path.with_name(f"{path.name}.gz")
    if not path.exists() and not packed.exists():
        raise OrthoFxError(f"{path.parent} holds neither {path.name} nor {packed.name}")
    path = path if path.exists() else packed
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path is packed else path.open("rb") as file:
            shape = _idx_shape(path, file.read(start), dimensions)
            size = math.prod(shape)
            require_memory(size, f"{path} promises {' x '.join(map(str, shape))} values")
            # One more than promised: a packed file may unpack to any size.
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise OrthoFxError(f"cannot read {path}: {reason(error)}") from None
    if len(content) != size:
        came = f"{start + len(content)}" if len(content) < size else f"{start + size + 1} or more"
        raise OrthoFxError(
            f"{path} promises {' x '.join(map(str, shape))} values in a header of {start} bytes, {start + size} bytes "
            f"in all; it has {came}"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _idx_shape(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    """The dimensions that the header of an IDX file promises."""
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions; then each dimension, big-endian.
    magic = bytes((0, 0, 8, dimensions))
    if header[:4] != magic:
        raise OrthoFxError(
            f"{path} must begin with {magic.hex(' ')}, as IDX files of this kind; got {header[:4].hex(' ')}"
        )
    size = 4 + 4 * dimensions
    if len(header) < size:
        raise OrthoFxError(f"{path} must have a header of {size} bytes; it has {len(header)} bytes in all")
    return tuple(int.from_bytes(header[at : at + 4], "big") for at in range(4, size, 4))


class ImageFolder(Images):
    """Images in root/train/CLASS/ and root/val/CLASS/, decoded by Pillow as they are read; three channels.

    Classes are the sorted names of the folders CLASS, which may have folders inside. Hidden files and files with other
    suffixes than `IMAGE_SUFFIXES` are left out. Validation images are cut to `central_crop`. Images are resized with
    bicubic filters and normalised by ImageNet's mean and standard deviation.

    Augmentation: "crop" (the default), random resized crops, half of them mirrored; "randaugment", the same and
    RandAugment; "none", training images are treated like validation images.

    Raises:
        OrthoFxError: a folder that is missing or has no images, other classes in val/ than in train/, or Pillow or
            torchvision is needed and missing; from `batch` and `validation_batch`, an image that cannot be read.
    """

    augments = ("crop", "randaugment", "none")

    def __init__(self, root: str | Path, settings: Settings = Settings(), *, image_size: int = 224) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError:
            raise OrthoFxError("images are decoded with Pillow: pip install pillow") from None
        self.root = Path(root)
        train, validation = (_list_images(self.root / split) for split in ("train", "val"))
        if train.keys() != validation.keys():
            lacks = [
                f"{split} lacks {', '.join(sorted(missing)[:5])}{' and more' if len(missing) > 5 else ''}"
                for split, missing in (("val", train.keys() - validation), ("train", validation.keys() - train))
                if missing
            ]
            raise OrthoFxError(f"train and val of {root} must have the same classes; {'; '.join(lacks)}")
        # Arrays, not lists: reference counts would make worker processes copy every memory page of a list.
        self.train_files, self.validation_files = (
            np.array([file for files, _ in split.values() for file in files]) for split in (train, validation)
        )
        train_labels, validation_labels = (
            np.repeat(np.arange(len(split)), [len(files) for files, _ in split.values()])
            for split in (train, validation)
        )
        size = sum(bytes for split in (train, validation) for _, bytes in split.values())
        super().__init__(
            f"images of {len(train)} classes, {len(train_labels)} train, {len(validation_labels)} val, {size} bytes",
            train_labels,
            validation_labels,
            settings,
            channels=3,
            classes=len(train),
            image_size=image_size,
        )
        self._rand_augment = RandAugment() if self.augment == "randaugment" else None

    def _training_images(self, chosen: NDArray[np.int64], seed: int, step: int, rows: range) -> Tensor:
        if self.augment == "none":
            return self._read("train", self.train_files[chosen], [None] * len(chosen))
        return self._read("train", self.train_files[chosen], [row_generator(seed, step, row) for row in rows])

    def _validation_images(self, chosen: NDArray[np.int64]) -> Tensor:
        return self._read("val", self.validation_files[chosen], [None] * len(chosen))

    def _read(self, split: str, files: NDArray[np.bytes_], generators: Sequence[np.random.Generator | None]) -> Tensor:
        images = np.empty((len(files), 3, self.image_size, self.image_size), dtype=np.float32)
        for image, file, generator in zip(images, files, generators, strict=True):
            pixels = self._cropped(self.root / split / os.fsdecode(file), generator)
            if generator is not None:
                if generator.random() < 0.5:
                    pixels = pixels[:, ::-1]
                if self._rand_augment is not None:
                    pixels = self._rand_augment(pixels, int(generator.integers(2**63)))
            for channel, values in enumerate(_NORMALISED):
                image[channel] = values[pixels[..., channel]]
        return torch.from_numpy(images)

    def _cropped(self, path: Path, generator: np.random.Generator | None) -> NDArray[np.uint8]:
        from PIL import Image

        try:
            with warnings.catch_warnings(), Image.open(path, formats=_FORMATS) as image:
                warnings.simplefilter("ignore")
                width, height = image.size
                if width * height > _LARGEST:
                    raise OrthoFxError(f"it has {width} x {height} pixels, and {_LARGEST:,} are the most")
                box = central_crop(width, height) if generator is None else random_crop(width, height, generator)
                sides = (self.image_size, self.image_size)
                return np.asarray(_eight_bits(image).convert("RGB").resize(sides, Image.Resampling.BICUBIC, box=box))
        except Exception as error:  # each decoder raises its own errors for damaged files
            raise OrthoFxError(f"cannot read the image {path}: {reason(error)}") from None


def _eight_bits(image: Any) -> Any:
    """The image with 8 bits a channel: convert("RGB") alone clips wider values at 255, which leaves one colour.

    Grey images of 16 bits are scaled. Integers of 32 bits and floating point have no range that could be scaled from.

    Raises:
        OrthoFxError: an image of 32-bit integers or of floating point.
    """
    from PIL import Image

    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not wide:
        if image.mode in ("I", "F"):
            kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
            raise OrthoFxError(f"its pixels are {kind}, whose range is unknown: save it with 8 or 16 bits a channel")
        return image
    # TIFF files may hold 12 bits in 16.
    bits = image.tag_v2.get(258, (16,))[0] if image.format == "TIFF" else 16
    largest = 2 ** min(max(bits, 8), 16) - 1
    values = np.asarray(image).astype(np.float64) * (255 / largest)
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


def _list_images(folder: Path) -> dict[str, tuple[list[bytes], int]]:
    """For each class, its images as paths relative to `folder`, and their total size in bytes."""
    if not folder.is_dir():
        raise OrthoFxError(f"images are read from train/CLASS/ and val/CLASS/, and {folder} is not a folder")
    found: dict[str, tuple[list[bytes], int]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            entries = list(image_files(path))
            if not entries:
                raise OrthoFxError(f"the folder {path} of a class holds no images: {', '.join(IMAGE_SUFFIXES)}")
            start = len(os.fsencode(folder)) + 1
            found[path.name] = [os.fsencode(e.path)[start:] for e in entries], sum(e.stat().st_size for e in entries)
    if not found:
        raise OrthoFxError(f"{folder} must hold a folder of images for each class; it holds none")
    return found


def image_files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """The images in a folder and its subfolders, in the order of their names."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from image_files(entry.path)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            yield entry
