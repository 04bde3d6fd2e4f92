"""Augmentation of images: shifts, flips, random crops, RandAugment, and the mixing of neighbouring rows.

All of it is drawn for a row of the global batch from (seed, step, row), however the rows are shared out: whichever
process computes a row sees the same image. NumPy pads seeds with zeros, so each use has a number of its own in them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.data.batch import Batch

AUGMENTS = ("none", "light", "flip", "crop", "randaugment")
_PLACES, _CHOICES, _MIXUPS, _CUTMIXES, _BOXES, _ROWS = range(1, 7)


def row_generator(seed: int, step: int, row: int) -> np.random.Generator:
    """The random numbers of one row of the global batch of a step."""
    return np.random.default_rng((seed, step, row, _ROWS))


def shift(
    images: NDArray[np.uint8], pixels: int, *, flip: bool, seed: int, step: int, rows: range
) -> NDArray[np.uint8]:
    """Shifts each image by up to `pixels` in both directions, zeros moving in, and flips every other one if asked to.

    Args:
        images: (rows, channels, height, width), zero being the background.
        pixels: the largest shift.
        flip: whether an image is mirrored, left to right, with probability one half.
        seed, step: of the batch.
        rows: numbers of these rows in the global batch.
    """
    if not rows:
        return images
    # Whole rows from one stream: a row's numbers do not depend on how many rows come after it.
    uniform = np.random.default_rng((seed, step, _PLACES)).random((max(rows) + 1, 3))[np.array(rows)]
    top, left = (uniform[:, :2] * (2 * pixels + 1)).astype(np.int64).T
    padded = np.pad(images, ((0, 0), (0, 0), (pixels, pixels), (pixels, pixels)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[2:], axis=(2, 3))
    shifted: NDArray[np.uint8] = windows[np.arange(len(images)), :, top, left]
    if flip:
        shifted = np.where((uniform[:, 2] < 0.5)[:, None, None, None], shifted[..., ::-1], shifted)
    return shifted


def random_crop(width: int, height: int, generator: np.random.Generator) -> tuple[float, float, float, float]:
    """A crop (left, top, right, bottom) of 8% to 100% of an image's area and an aspect ratio from 3/4 to 4/3.

    As in Szegedy et al., "Going deeper with convolutions", 2014, section 6: the area is uniform, the ratio log-uniform.
    An image so narrow that ten crops did not fit gets the largest central one of an allowed ratio.
    """
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1.0)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            x, y = generator.integers((width - across + 1, height - down + 1)).tolist()
            return x, y, x + across, y + down
    across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def central_crop(width: int, height: int) -> tuple[float, float, float, float]:
    """The central square (left, top, right, bottom) with 0.875 of the shorter side.

    Resized to N pixels, it is what resizing the shorter side to N / 0.875 and cutting the centre out comes to.
    """
    side = 0.875 * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


class RandAugment:
    """torchvision's RandAugment with its defaults, two operations of magnitude 9 of 30, from a seed of each image.

    Cubuk et al., "RandAugment: practical automated data augmentation with a reduced search space", 2019.

    Raises:
        OrthoFxError: torchvision is not installed, or does not fit the installed PyTorch.
    """

    def __init__(self) -> None:
        try:
            from torchvision.transforms import v2
        except (ImportError, RuntimeError):  # RuntimeError: one that was built for another PyTorch
            raise OrthoFxError(
                "augment 'randaugment' needs torchvision, one that fits the installed PyTorch: pip install torchvision"
            ) from None
        self._transform = v2.RandAugment(num_ops=2, magnitude=9)

    def __call__(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """The augmented image (height, width, 3); PyTorch's own random numbers stay as they were."""
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed CUDA as well, which nothing here restores.
            torch.default_generator.manual_seed(seed)
            pixels = self._transform(pixels)
        augmented: NDArray[np.uint8] = pixels.numpy().transpose(1, 2, 0)
        return augmented


def mix(
    images: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, *, seed: int, step: int, rows: range
) -> Batch:
    """Mixes rows 2k and 2k + 1 of the global batch with each other, and their labels likewise.

    Mixup (Zhang et al., 2017) takes the share lambda ~ Beta(alpha, alpha) of the row itself and 1 - lambda of its
    neighbour. CutMix (Yun et al., 2019) takes a box of the neighbour whose area is a share 1 - lambda before it is cut
    off at the border, and counts the pixels that are left. With both, a pair gets one of them, each half of the time.

    Args:
        images: (B, C, H, W) float32.
        labels: (B,) int64.
        classes: number of classes.
        mixup, cutmix: alpha of each; 0 is without it.
        seed, step: of the batch.
        rows: numbers of these rows in the global batch.

    Returns:
        Images as they came in shape and type, and targets (B, classes) float32.

    Raises:
        OrthoFxError: rows that part a pair.
    """
    if rows.step != 1 or rows.start % 2 or rows.stop % 2:
        raise OrthoFxError(
            "mixup and cutmix mix rows 2k and 2k + 1 of a batch: batch sizes, and the rows of each part, must be even; "
            f"got rows {rows.start} to {rows.stop}" + (f" in steps of {rows.step}" if rows.step != 1 else "")
        )
    first, last = rows.start // 2, rows.stop // 2
    height, width = images.shape[2:]

    def stream(use: int) -> np.random.Generator:
        return np.random.default_rng((seed, step, use))

    mixups = np.full(last, bool(mixup))
    if mixup and cutmix:
        mixups = stream(_CHOICES).random(last) < 0.5
    keep = np.ones((last, height, width), dtype=np.float32)
    shares = np.ones(last, dtype=np.float32)
    if mixup:
        shares[mixups] = stream(_MIXUPS).beta(mixup, mixup, last)[mixups]
        keep *= shares[:, None, None]
    if cutmix:
        halves = np.sqrt(1 - stream(_CUTMIXES).beta(cutmix, cutmix, last))[:, None] / 2
        centres, sides = stream(_BOXES).random((last, 2)), np.array((height, width))
        lows, highs = (np.rint((centres + half).clip(0, 1) * sides).astype(int) for half in (-halves, halves))
        for pair in np.flatnonzero(~mixups):
            (top, left), (bottom, right) = lows[pair], highs[pair]
            keep[pair, top:bottom, left:right] = 0.0
            shares[pair] = 1 - (bottom - top) * (right - left) / (height * width)
    own, share = torch.from_numpy(keep[first:, None, None]), torch.from_numpy(shares[first:, None, None])
    targets = torch.nn.functional.one_hot(labels, classes).float()
    return _with_neighbour(images, own), _with_neighbour(targets, share)


def _with_neighbour(values: Tensor, own: Tensor) -> Tensor:
    """The share `own` of each row and the rest of its neighbour: products and a sum, which round alike in any batch."""
    pairs = values.unflatten(0, (len(values) // 2, 2))
    return (own * pairs + (1 - own) * pairs.flip(1)).flatten(0, 1)
