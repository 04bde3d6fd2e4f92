"""Augmentation of images: shifts, flips, random crops, RandAugment, and the mixing of neighbouring rows.

Random numbers depend on (seed, step, row of the global batch) alone, so every process computes the same image for a
row. NumPy pads seeds with zeros, so each use of random numbers has a number of its own in the seed.
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
    """Shifts each image by up to `pixels` in both directions, filling with zeros, and mirrors half of them with `flip`.

    Args:
        images: (rows, channels, height, width); zero is the background.
        pixels: the largest shift.
        flip: whether to mirror images, left to right, with probability one half each.
        seed, step: of the batch.
        rows: numbers of these rows in the global batch.
    """
    if not rows:
        return images
    # One stream is drawn row by row, so a row's numbers do not depend on how many rows come after it.
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
    If ten random crops do not fit, as in very narrow images, the crop is the largest central one of an allowed ratio.
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

    Resizing it to N pixels is the same as resizing the shorter side to N / 0.875 and cutting out the centre.
    """
    side = 0.875 * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


class RandAugment:
    """torchvision's RandAugment with its defaults (two operations of magnitude 9 of 30) and a seed for each image.

    Cubuk et al., "RandAugment: practical automated data augmentation with a reduced search space", 2019.

    Raises:
        OrthoFxError: torchvision is missing or was built for another PyTorch.
    """

    def __init__(self) -> None:
        try:
            from torchvision.transforms import v2
        except (ImportError, RuntimeError):  # RuntimeError: torchvision was built for another PyTorch
            raise OrthoFxError(
                "augment 'randaugment' needs torchvision, one that fits the installed PyTorch: pip install torchvision"
            ) from None
        self._transform = v2.RandAugment(num_ops=2, magnitude=9)

    def __call__(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """The augmented image (height, width, 3); the state of PyTorch's generators does not change."""
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed CUDA, whose generators fork_rng does not restore here.
            torch.default_generator.manual_seed(seed)
            pixels = self._transform(pixels)
        augmented: NDArray[np.uint8] = pixels.numpy().transpose(1, 2, 0)
        return augmented


def mix(
    images: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, *, seed: int, step: int, rows: range
) -> Batch:
    """Mixes rows 2k and 2k + 1 of the global batch with each other, images and labels.

    Mixup (Zhang et al., 2017) adds lambda times the row and 1 - lambda times its neighbour; lambda ~ Beta(alpha,
    alpha). CutMix (Yun et al., 2019) pastes a box of the neighbour. The box has a share 1 - lambda of the area before
    it is cut off at the border; labels are mixed by the pixels that are left. With both, each pair gets one at random.

    Args:
        images: (B, C, H, W) float32.
        labels: (B,) int64.
        classes: number of classes.
        mixup, cutmix: alpha of each; 0 turns it off.
        seed, step: of the batch.
        rows: numbers of these rows in the global batch.

    Returns:
        Images of the same shape and dtype, and targets (B, classes) float32.

    Raises:
        OrthoFxError: rows that split a pair.
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
    """own * row + (1 - own) * neighbour; elementwise products and sums round alike in a batch of any size."""
    pairs = values.unflatten(0, (len(values) // 2, 2))
    return (own * pairs + (1 - own) * pairs.flip(1)).flatten(0, 1)
