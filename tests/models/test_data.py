import sys

import numpy as np
import pytest
import torch

from ortho_fx import OrthoFxError
from ortho_fx.models.data import Digits, StandardLibrary


def test_the_standard_library_is_python_source():
    data = StandardLibrary(context=32)
    assert len(data.train_bytes) > 5_000_000
    assert len(data.validation_bytes) > 300_000
    assert b"def __init__(self" in data.train_bytes.tobytes()
    assert data.validation_bytes[:200].tobytes() not in data.train_bytes.tobytes()


@pytest.mark.parametrize("data", [StandardLibrary(context=32), Digits()], ids=["text", "digits"])
def test_batches_depend_on_seed_and_step_alone(data):
    for a, b in zip(data.batch(0, 5, 4), data.batch(0, 5, 4), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(data.batch(0, 5, 4)[0], data.batch(0, 6, 4)[0])
    assert not torch.equal(data.batch(0, 5, 4)[0], data.batch(1, 5, 4)[0])
    first, second = list(data.validation(8)), list(data.validation(8))
    assert len(first) > 1
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_targets_are_the_next_bytes():
    inputs, targets = StandardLibrary(context=32).batch(0, 0, 4)
    assert inputs.shape == targets.shape == (4, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_digits_are_normalised_and_split_without_overlap():
    data = Digits()
    images, labels = data.train_set
    assert (len(images), len(data.validation_set[0])) == (1541, 256)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    assert labels.unique().tolist() == list(range(10))
    train = {image.numpy().tobytes() for image in images}
    assert not train & {image.numpy().tobytes() for image in data.validation_set[0]}


def test_training_digits_move_by_one_pixel_at_most():
    data = Digits()
    batch, _ = data.batch(0, 0, 16)
    images = data.train_set[0]
    chosen = np.random.default_rng((0, 0)).integers(len(images), size=16)
    blank = float(images.min())
    for moved, original in zip(batch, images[torch.from_numpy(chosen)], strict=True):
        padded = torch.nn.functional.pad(original, (1, 1, 1, 1), value=blank)
        assert any(torch.equal(moved, padded[:, i : i + 8, j : j + 8]) for i in range(3) for j in range(3))


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(OrthoFxError, match=r"pip install 'ortho-fx\[train\]'"):
        Digits()
