import sys
import types

import numpy as np
import pytest
import torch

from ortho_fx import OrthoFxError
from ortho_fx.models.data.augment import RandAugment, central_crop, mix, random_crop, row_generator, shift

CLASSES = 5


def pixels(count=64, size=7):
    return np.random.default_rng(0).integers(1, 256, (count, 2, size, size)).astype(np.uint8)


def test_shifts_move_by_no_more_than_asked_and_zeros_move_in():
    images, rows = pixels(), range(64)
    moved = shift(images, 2, flip=False, seed=0, step=0, rows=rows)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    places = set()
    for original, image in zip(padded, moved, strict=True):
        fits = [(i, j) for i in range(5) for j in range(5) if (original[:, i : i + 7, j : j + 7] == image).all()]
        assert len(fits) == 1
        places |= set(fits)
    assert len(places) > 15
    assert {i for i, _ in places} == {j for _, j in places} == set(range(5))


def test_half_of_the_images_are_flipped_after_the_same_shift():
    images, rows = pixels(), range(64)
    moved, flipped = (shift(images, 1, flip=flip, seed=0, step=0, rows=rows) for flip in (False, True))
    same = (moved == flipped).all((1, 2, 3))
    mirrored = (moved[..., ::-1] == flipped).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 20 < mirrored.sum() < 44


def test_shifts_belong_to_the_row():
    images = pixels(8)
    whole = shift(images, 2, flip=True, seed=1, step=2, rows=range(8))
    for rows in (range(0, 3), range(5, 8), range(0, 8, 2), range(4, 4)):
        assert (shift(images[list(rows)], 2, flip=True, seed=1, step=2, rows=rows) == whole[list(rows)]).all()


def test_random_crops_have_the_areas_and_ratios_they_should():
    crops = np.array([random_crop(400, 300, row_generator(0, 0, row)) for row in range(2000)])
    width, height = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    assert crops.min() >= 0
    assert crops[:, 2].max() <= 400
    assert crops[:, 3].max() <= 300
    area, ratio = width * height / (400 * 300), width / height
    assert 0.075 < area.min() < 0.1
    assert area.max() > 0.9
    assert 0.74 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 1.36
    assert abs(np.log(ratio).mean()) < 0.03


def test_an_image_too_narrow_for_any_crop_gets_its_middle():
    assert random_crop(1000, 10, row_generator(0, 0, 0)) == (493.5, 0, 506.5, 10)
    assert random_crop(10, 1000, row_generator(0, 0, 0)) == (0, 493.5, 10, 506.5)


def test_the_central_crop_is_the_centre_of_the_resized_image():
    assert central_crop(256, 256) == (16, 16, 240, 240)
    assert central_crop(512, 256) == (144, 16, 368, 240)


def batch(count=64, size=8, step=0):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.arange(count) % CLASSES


def mixed(images, labels, mixup, cutmix, rows=None, step=0):
    return mix(images, labels, CLASSES, mixup, cutmix, seed=0, step=step, rows=rows or range(len(images)))


def shares(labels, targets):
    """lambda of each row whose neighbour has another label, read from the targets."""
    return targets[torch.arange(len(labels)), labels]


def test_mixup_takes_a_share_of_the_row_and_the_rest_of_its_neighbour():
    images, labels = batch()
    inputs, targets = mixed(images, labels, 0.8, 0.0)
    share = shares(labels, targets)
    assert torch.equal(share[::2], share[1::2])
    neighbours = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    wide = share[:, None, None, None]
    torch.testing.assert_close(inputs, wide * images + (1 - wide) * neighbours)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    assert targets.dtype == inputs.dtype == torch.float32
    assert len(share.unique()) == 32
    assert abs(share.mean() - 0.5) < 0.15


def test_cutmix_takes_a_box_of_the_neighbour_and_counts_its_pixels():
    images, labels = batch()
    inputs, targets = mixed(images, labels, 0.0, 1.0)
    neighbours = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    own, other = (inputs == images).all(1), (inputs == neighbours).all(1)
    assert (own ^ other).all()
    torch.testing.assert_close(shares(labels, targets), own.float().mean((1, 2)))
    for box in other:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)
    assert torch.equal(own[::2], own[1::2])
    assert 0.2 < other.float().mean() < 0.6


def test_the_area_of_a_box_is_one_minus_lambda():
    # With a large alpha lambda is near one half; boxes that the border does not cut off have half of the area.
    images, labels = batch(400, 32)
    inputs, _ = mixed(images, labels, 0.0, 1e6)
    areas = (inputs != images).all(1).float().mean((1, 2))
    assert abs(areas.max() - 0.5) < 0.03


def test_with_both_each_pair_has_one_half_and_half():
    images, labels = batch(200)
    inputs, _ = mixed(images, labels, 0.8, 1.0)
    neighbours = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    cut = ((inputs == images) | (inputs == neighbours)).all(1).all(-1).all(-1)
    assert torch.equal(cut[::2], cut[1::2])
    assert 35 < cut[::2].sum() < 65


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_belongs_to_the_pair(mixup, cutmix):
    images, labels = batch(10)
    whole = mixed(images, labels, mixup, cutmix)
    for rows in (range(0, 2), range(2, 10), range(4, 4)):
        at = slice(rows.start, rows.stop)
        part = mix(images[at], labels[at], CLASSES, mixup, cutmix, seed=0, step=0, rows=rows)
        assert all(torch.equal(p, w[at]) for p, w in zip(part, whole, strict=True))
    assert not torch.equal(whole[1], mixed(images, labels, mixup, cutmix, step=1)[1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [(range(0, 7), "got rows 0 to 7$"), (range(1, 4), "got rows 1 to 4$"), (range(0, 8, 2), "0 to 8 in steps of 2")],
)
def test_rows_that_part_a_pair(rows, message):
    images, labels = batch(len(rows))
    with pytest.raises(OrthoFxError, match=message):
        mixed(images, labels, 0.8, 0.0, rows)


def test_without_torchvision_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(OrthoFxError, match=r"augment 'randaugment' needs torchvision, .*: pip install torchvision"):
        RandAugment()


def test_randaugment_is_drawn_from_the_seed_of_the_image(monkeypatch):
    class Noise:
        """Draws from PyTorch's global generator, as torchvision's transforms do."""

        def __init__(self, num_ops, magnitude):
            assert (num_ops, magnitude) == (2, 9)

        def __call__(self, image):
            assert image.shape == (3, 4, 5)
            return (image + torch.randint(0, 50, image.shape)).to(torch.uint8)

    transforms = types.ModuleType("torchvision.transforms")
    transforms.v2 = types.SimpleNamespace(RandAugment=Noise)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
    augment, image = RandAugment(), np.zeros((4, 5, 3), dtype=np.uint8)
    before = torch.get_rng_state()
    first = augment(image[:, ::-1], 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert first.shape == (4, 5, 3)
    assert (augment(image, 7) == first).all()
    assert (augment(image, 8) != first).any()
