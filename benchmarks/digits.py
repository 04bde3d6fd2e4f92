"""scikit-learn's digits as the benchmarks of small networks use them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) of mean 0 and deviation 1, and their classes, in a fixed random order."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].float(), labels[order]
