"""`open_data` opens data of any kind; it finds out what a path holds.

Every random choice is a function of seed, step and row of the global batch. A resumed run and runs with other numbers
of processes, workers and micro-batches see the same samples with the same augmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.data.augment import AUGMENTS
from ortho_fx.models.data.batch import Batch, Data, Kind
from ortho_fx.models.data.images import IDX, Digits, ImageFolder, Images, Settings, image_files
from ortho_fx.models.data.text import (
    STANDARD_LIBRARY,
    VALIDATION_SAMPLES,
    StandardLibrary,
    TextFiles,
    TokenFiles,
    Tokens,
    find_text,
)

__all__ = ["ACCEPTED", "Batch", "Data", "DataConfig", "Digits", "Kind", "StandardLibrary", "open_data"]

ACCEPTED: dict[str, str] = {
    "tokens": f"{STANDARD_LIBRARY}, a folder with train.bin and val.bin, a text file, or a folder of text files",
    "images": "digits, a folder with train-images-idx3-ubyte and the other IDX files, "
    "or a folder with images in train/CLASS/ and val/CLASS/",
}


@dataclass(frozen=True)
class DataConfig:
    """The source of data and its settings.

    Args:
        source: "standard-library", "digits", or a path.
        context: number of tokens in a window; tokens need it, images do not have it.
        image_size: side in pixels to which images of a folder are cut (None: 224).
        augment: one of `AUGMENTS`; None is "light" for digits and IDX files and "crop" for folders of images.
        mixup, cutmix: alpha of each, for images; 0 turns it off.
        validation_samples: number of windows or images in a validation (None: 320 windows, or all images).

    Raises:
        OrthoFxError: a value that is out of range.
    """

    source: str
    context: int | None = None
    image_size: int | None = None
    augment: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    validation_samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("context", "image_size", "validation_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OrthoFxError(f"{name} must be 1 or more; got {value}")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise OrthoFxError(f"{name} must be a finite number from 0 up; got {value}")
        if self.augment is not None and self.augment not in AUGMENTS:
            raise OrthoFxError(f"augment must be one of {', '.join(AUGMENTS)}; got {self.augment!r}")


@overload
def open_data(config: DataConfig, kind: Literal["tokens"]) -> Tokens: ...
@overload
def open_data(config: DataConfig, kind: Literal["images"]) -> Images: ...
def open_data(config: DataConfig, kind: Kind) -> Tokens | Images:
    """Opens data for a model that takes "tokens" or "images".

    Args:
        config: the source and its settings.
        kind: "tokens" or "images", as the model takes.

    Raises:
        OrthoFxError: a source that does not exist, is not recognised or is of the other kind, settings of the other
            kind, or any error of the data.
    """
    source = _recognise(config.source)
    if source is None:
        problem = "is none of them" if Path(config.source).exists() else "does not exist"
        raise OrthoFxError(f"data of {kind} is {ACCEPTED[kind]}; got {config.source!r}, which {problem}")
    if source.kind != kind:
        raise OrthoFxError(f"{config.source} holds {source.kind}, and the model takes {kind}: {ACCEPTED[kind]}")
    if issubclass(source, Tokens):
        return _open_tokens(source, config)
    return _open_images(source, config)


def _recognise(source: str) -> type[Tokens] | type[Images] | None:
    """The class for a source, by the files in its folder; None if nothing matches."""
    named: dict[str, type[Tokens] | type[Images]] = {STANDARD_LIBRARY: StandardLibrary, "digits": Digits}
    path = Path(source)
    if source in named:
        return named[source]
    if any((path / name).exists() for name in ("train.bin", "val.bin")):
        return TokenFiles
    if any(path.glob("*-idx3-ubyte*")):
        return IDX
    for split in ("train", "val"):
        folders = (folder for folder in path.glob(f"{split}/*") if folder.is_dir())
        if any(any(image_files(folder)) for folder in folders):
            return ImageFolder
    return TextFiles if any(find_text(path)) else None


def _open_tokens(source: type[Tokens], config: DataConfig) -> Tokens:
    _refuse(config, "images", ("image_size", "augment", "mixup", "cutmix"))
    if config.context is None:
        raise OrthoFxError("data of tokens needs a context, the number of tokens in a window; got none")
    samples = config.validation_samples or VALIDATION_SAMPLES
    if source is StandardLibrary:
        return StandardLibrary(config.context, samples)
    reader = TextFiles if source is TextFiles else TokenFiles
    return reader(config.source, config.context, samples)


def _open_images(source: type[Images], config: DataConfig) -> Images:
    _refuse(config, "tokens", ("context",))
    settings = Settings(config.augment, config.mixup, config.cutmix, config.validation_samples)
    if source is ImageFolder:
        return ImageFolder(config.source, settings, image_size=config.image_size or 224)
    images = Digits(settings) if source is Digits else IDX(config.source, settings)
    if config.image_size not in (None, images.image_size):
        raise OrthoFxError(
            f"image_size cuts the images of a folder; those of {config.source} have {images.image_size} pixels a side, "
            f"got {config.image_size}"
        )
    return images


def _refuse(config: DataConfig, kind: str, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(config, name):
            raise OrthoFxError(f"{name} is a setting of {kind}; got {getattr(config, name)} for {config.source}")
