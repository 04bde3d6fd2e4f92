import gzip
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from ortho_fx import OrthoFxError
from ortho_fx.models.data.images import IDX, Digits, ImageFolder, Settings, epoch_order
from ortho_fx.models.data.loader import load_validation

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def idx_bytes(values):
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">u4").tobytes()
    return header + values.astype(np.uint8).tobytes()


def write_idx(folder, *, packed=False, size=6, train=50, validation=20):
    """Writes four IDX files; image number n of a split has the value n in its corner."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", validation)):
        images = generator.integers(0, 256, (count, size, size))
        images[:, 2, 3] = np.arange(count)
        for name, values in (("images-idx3", images), ("labels-idx1", np.arange(count) % 5)):
            content = idx_bytes(values)
            path = folder / f"{split}-{name}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def write_images(root, *, classes=("ant", "bee"), train=6, validation=3, size=(40, 30)):
    """Writes a folder of PNGs; each image has a colour of its own."""
    number = 0
    for split, count in (("train", train), ("val", validation)):
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for _ in range(count):
                number += 1
                colour = (5 * number % 256, 3 * number % 256, number)
                Image.new("RGB", size, colour).save(root / split / label / f"{number:03}.png")
    return root


def colours(images):
    """The three values of a pixel in the middle of each image, from 0 to 255."""
    middle = images.shape[-1] // 2
    return ((images * STD + MEAN) * 255).round()[:, :, middle, middle].int()


@pytest.mark.parametrize("size", [4, 7, 30])
def test_an_epoch_has_each_sample_once_and_batches_run_across(size):
    positions = np.arange(60)
    batches = [epoch_order(10, 0, step * size + np.arange(size)) for step in range(-(-60 // size))]
    order = np.concatenate(batches)[:60]
    assert (order == epoch_order(10, 0, positions)).all()
    epochs = order.reshape(6, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
    assert (epoch_order(10, 1, positions) != order).any()


def test_digits_show_each_image_once_an_epoch():
    data = Digits(Settings(augment="none"))
    assert (len(data.train_labels), len(data.validation_labels)) == (1541, 256)
    assert (data.channels, data.classes, data.image_size) == (1, 10, 8)
    inputs, labels = (
        torch.cat(column)[:1541] for column in zip(*(data.batch(0, s, 64) for s in range(25)), strict=True)
    )
    assert abs(inputs.mean()) < 1e-5
    assert abs(inputs.std() - 1) < 1e-3
    assert torch.equal(labels.bincount(), torch.from_numpy(data.train_labels).bincount())
    seen = {image.numpy().tobytes() for image in inputs}
    assert len(seen) > 1530
    held = {image.numpy().tobytes() for batch, _ in load_validation(data, size=64) for image in batch}
    assert len(held) == 256
    assert not seen & held


def test_training_digits_move_by_one_pixel_at_most():
    light, plain = Digits(), Digits(Settings(augment="none"))
    (moved, labels), (originals, same) = light.batch(0, 0, 32), plain.batch(0, 0, 32)
    assert torch.equal(labels, same)
    assert not torch.equal(moved, originals)
    padded = torch.nn.functional.pad(originals, (1, 1, 1, 1), value=float(originals.min()))
    for image, around in zip(moved, padded, strict=True):
        assert any(torch.equal(image, around[:, i : i + 8, j : j + 8]) for i in range(3) for j in range(3))


def test_mixing_gives_soft_targets_and_needs_even_rows():
    data = Digits(Settings(mixup=0.8, cutmix=1.0))
    inputs, targets = data.batch(0, 0, 8)
    assert inputs.shape == (8, 1, 8, 8)
    assert targets.shape == (8, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    parts = [data.batch(0, 0, 8, rows)[1] for rows in (slice(0, 2), slice(2, 8))]
    assert torch.equal(torch.cat(parts), targets)
    with pytest.raises(OrthoFxError, match="must be even; got rows 0 to 3"):
        data.batch(0, 0, 8, slice(0, 3))
    assert next(load_validation(data, size=8))[1].dtype == torch.int64


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(OrthoFxError, match=r"pip install scikit-learn"):
        Digits()


def test_idx_files_plain_and_gzipped_are_the_same(tmp_path):
    plain, packed = IDX(write_idx(tmp_path / "plain")), IDX(write_idx(tmp_path / "packed", packed=True))
    assert plain.name == packed.name
    assert plain.name.startswith("images 6 x 6, 50 train, 20 val, crc32 ")
    assert all(torch.equal(a, b) for a, b in zip(plain.batch(0, 0, 8), packed.batch(0, 0, 8), strict=True))
    assert (plain.channels, plain.classes, plain.image_size) == (1, 5, 6)


def test_idx_images_are_normalised_by_the_training_set_and_stay_with_their_labels(tmp_path):
    data = IDX(write_idx(tmp_path), Settings(augment="none"))
    images, labels = data.batch(0, 0, 50)
    assert abs(images.mean()) < 1e-5
    assert abs(images.std(correction=0) - 1) < 1e-5
    numbers = (images[:, 0, 2, 3] * data.std + data.mean).round().int()
    assert sorted(numbers.tolist()) == list(range(50))
    assert torch.equal(numbers % 5, labels.int())
    ((held, held_labels),) = load_validation(data, size=20)
    assert torch.equal((held[:, 0, 2, 3] * data.std + data.mean).round().int(), torch.arange(20).int())
    assert torch.equal(held_labels, torch.arange(20) % 5)


def test_validation_samples_are_spread_over_the_set(tmp_path):
    data = IDX(write_idx(tmp_path), Settings(validation_samples=3))
    ((_, labels),) = load_validation(data, size=4)
    assert labels.tolist() == [0, 4, 4, -100]  # images 0, 9 and 19


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], r"promises 50 x 6 x 6 values in a header of 16 bytes, 1816 bytes in all; it has 1815"),
        (lambda b: b + b"x", r"1816 bytes in all; it has 1817 or more"),
        (lambda b: b[:10], r"must have a header of 16 bytes; it has 10 bytes in all"),
        (
            lambda b: b"\x00\x00\x08\x01" + b[4:],
            r"must begin with 00 00 08 03, as IDX files of this kind; got 00 00 08 01",
        ),
        (lambda b: b"", r"must begin with 00 00 08 03, .*; got $"),
        (
            lambda b: idx_bytes(np.zeros((50, 6, 5))),
            r"train images of .* must be square, and one or more; got 50 x 6 x 5",
        ),
        (lambda b: idx_bytes(np.zeros((49, 6, 6))), r"has 49 train images and 50 train labels"),
        (
            lambda b: idx_bytes(np.zeros((50, 7, 7))),
            r"must have one size; training and validation have 7 x 7 and 6 x 6",
        ),
    ],
)
def test_idx_files_that_are_damaged(tmp_path, damage, message):
    path = write_idx(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OrthoFxError, match=message):
        IDX(tmp_path)


def test_idx_files_that_are_missing_cut_short_or_of_other_labels(tmp_path):
    write_idx(tmp_path, packed=True)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(OrthoFxError, match=r"cannot read .*t10k-labels-idx1-ubyte.gz: Compressed file ended"):
        IDX(tmp_path)
    path.write_bytes(gzip.compress(idx_bytes(np.arange(20))))
    with pytest.raises(OrthoFxError, match="go up to 4 in training and to 19 in validation"):
        IDX(tmp_path)
    path.unlink()
    with pytest.raises(OrthoFxError, match=r"holds neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz"):
        IDX(tmp_path)


def test_a_folder_of_images_keeps_each_with_its_class(tmp_path):
    data = ImageFolder(write_images(tmp_path), Settings(augment="none"), image_size=8)
    assert data.name.startswith("images of 2 classes, 12 train, 6 val, ")
    assert (data.channels, data.classes) == (3, 2)
    images, labels = data.batch(0, 0, 12)
    assert images.shape == (12, 3, 8, 8)
    numbers = colours(images)[:, 2]
    assert sorted(numbers.tolist()) == list(range(1, 13))
    assert torch.equal(labels, (numbers > 6).long())
    ((held, held_labels),) = load_validation(data, size=6)
    assert colours(held)[:, 2].tolist() == list(range(13, 19))
    assert held_labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_validation_images_are_resized_and_cut_as_usual(tmp_path):
    write_images(tmp_path, train=1, validation=1, size=(90, 60))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC)
    image.save(tmp_path / "val" / "ant" / "003.png")
    data = ImageFolder(tmp_path, image_size=28)
    ((images, _),) = load_validation(data, size=2)
    # The shorter side becomes 28 / 0.875 = 32 and the image 48 x 32; its centre is 28 x 28 pixels from (10, 2).
    usual = image.resize((48, 32), Image.Resampling.BICUBIC).crop((10, 2, 38, 30))
    expected = (torch.from_numpy(np.array(usual)).permute(2, 0, 1) / 255 - MEAN) / STD
    assert (images[0] - expected).abs().max() < 0.03


def test_training_crops_are_parts_of_the_image_and_half_of_them_mirrored(tmp_path):
    write_images(tmp_path, classes=("ant",), train=1, validation=1)
    red, green = np.meshgrid(np.arange(200), np.arange(200))
    ramp = np.stack([red, green, red * 0], -1).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "train" / "ant" / "001.png")
    data = ImageFolder(tmp_path, image_size=16)
    images, _ = data.batch(0, 0, 64)
    values = (images * STD + MEAN) * 255
    across, down = values[:, 0, 8, -1] - values[:, 0, 8, 0], values[:, 1, -1, 8] - values[:, 1, 0, 8]
    assert (down > 0).all()
    assert 20 < (across < 0).sum() < 44
    assert across.abs().min() < 90
    assert across.abs().max() > 150
    assert len(values[:, 1, 0, 8].unique()) > 40


def test_randaugment_comes_after_the_crop_from_a_seed_of_the_row(tmp_path, monkeypatch):
    class Noise:
        def __init__(self, num_ops, magnitude):
            pass

        def __call__(self, image):
            return (image // 2 + torch.randint(0, 100, image.shape)).to(torch.uint8)

    transforms = types.ModuleType("torchvision.transforms")
    transforms.v2 = types.SimpleNamespace(RandAugment=Noise)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
    write_images(tmp_path)
    data = ImageFolder(tmp_path, Settings(augment="randaugment"), image_size=8)
    images, _ = data.batch(0, 0, 6)
    assert torch.equal(torch.cat([data.batch(0, 0, 6, slice(i, i + 2))[0] for i in (0, 2, 4)]), images)
    assert not torch.equal(images, ImageFolder(tmp_path, image_size=8).batch(0, 0, 6)[0])
    assert len(images[:, 0].flatten(1).unique(dim=0)) == 6


def test_files_of_other_kinds_and_folders_inside_a_class(tmp_path):
    write_images(tmp_path)
    inside = tmp_path / "train" / "ant" / "more"
    inside.mkdir()
    Image.new("L", (20, 20), 200).save(inside / "grey.JPG")
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(inside / "clear.png")
    (inside / "notes.txt").write_text("no image")
    (inside / ".hidden.png").write_bytes(b"")
    (tmp_path / "train" / ".thumbnails").mkdir()
    data = ImageFolder(tmp_path, Settings(augment="none"), image_size=8)
    assert len(data.train_labels) == 14
    assert torch.isfinite(data.batch(0, 0, 14)[0]).all()


def test_a_relative_root(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(
        ImageFolder(".", image_size=8).batch(0, 0, 4)[0], ImageFolder(tmp_path, image_size=8).batch(0, 0, 4)[0]
    )


def test_a_folder_that_is_not_as_it_should_be(tmp_path):
    write_images(tmp_path, classes=("ant", "bee", "cow"))
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "elk")
    with pytest.raises(OrthoFxError, match="must have the same classes; val lacks bee; train lacks elk"):
        ImageFolder(tmp_path)
    for path in (tmp_path / "train" / "ant").iterdir():
        path.unlink()
    with pytest.raises(OrthoFxError, match=r"the folder .*ant of a class holds no images: \.bmp, \.jpeg, \.jpg"):
        ImageFolder(tmp_path)
    (tmp_path / "val").rename(tmp_path / "test")
    (tmp_path / "train" / "ant").rmdir()
    with pytest.raises(OrthoFxError, match=r"read from train/CLASS/ and val/CLASS/, and .*val is not a folder"):
        ImageFolder(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(OrthoFxError, match=r"val must hold a folder of images for each class; it holds none"):
        ImageFolder(tmp_path)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    write_images(tmp_path)
    path = tmp_path / "val" / "bee" / "016.png"
    content = path.read_bytes()
    for damaged, reason in ((b"no image", "cannot identify image file"), (content[:60], ".+")):
        path.write_bytes(damaged)
        with pytest.raises(OrthoFxError, match=rf"^cannot read the image .*val/bee/016\.png: {reason}"):
            list(load_validation(ImageFolder(tmp_path, image_size=8), size=6))


def test_without_pillow_or_torchvision_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(OrthoFxError, match="augment 'randaugment' needs torchvision"):
        ImageFolder(tmp_path, Settings(augment="randaugment"))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(OrthoFxError, match=r"images are decoded with Pillow: pip install pillow"):
        ImageFolder(tmp_path)


def _folder_of(tmp_path, image, name):
    for split in ("train", "val"):
        path = tmp_path / split / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **({"format": "GIF"} if name == "gif.png" else {}))
    return ImageFolder(tmp_path, Settings(augment="none"), image_size=28)


_RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)


@pytest.mark.parametrize("name", ["0.png", "0.tif", "0.ppm"])
def test_grey_images_of_16_bits_are_scaled(tmp_path, name):
    wide = _folder_of(tmp_path / "wide", Image.fromarray(_RAMP.astype(np.uint16)), name).batch(0, 0, 1)[0]
    narrow = _folder_of(tmp_path / "narrow", Image.fromarray((_RAMP / 257).astype(np.uint8)), name).batch(0, 0, 1)[0]
    torch.testing.assert_close(wide, narrow, rtol=0, atol=0.03)  # 1 of 255 is 0.017
    assert wide.std() > 0.5


@pytest.mark.parametrize(
    ("pixels", "name", "message"),
    [
        (_RAMP.astype(np.int32), "0.tif", "its pixels are 32-bit integers, whose range is unknown"),
        (_RAMP.astype(np.float32), "0.tif", "its pixels are floating-point numbers, whose range is unknown"),
        (_RAMP.astype(np.uint8), "gif.png", "cannot identify image file"),
    ],
)
def test_images_without_a_range_or_of_other_formats_are_refused(tmp_path, pixels, name, message):
    with pytest.raises(OrthoFxError, match=f"cannot read the image .*{name}: {message}"):
        _folder_of(tmp_path, Image.fromarray(pixels), name).batch(0, 0, 1)


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ortho_fx.models.data.images._LARGEST", 1000)
    with pytest.raises(OrthoFxError, match=r"it has 32 x 32 pixels, and 1,000 are the most"):
        _folder_of(tmp_path, Image.fromarray(_RAMP.astype(np.uint8)), "0.png").batch(0, 0, 1)


def test_a_packed_file_is_unpacked_as_far_as_its_header_promises(tmp_path):
    header = bytes((0, 0, 8, 3)) + b"".join(size.to_bytes(4, "big") for size in (2, 4, 4))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header + bytes(2**24)))
    with pytest.raises(OrthoFxError, match="48 bytes in all; it has 49 or more"):
        IDX(tmp_path)
    path.write_bytes(gzip.compress(header[:4] + b"\xff" * 12))
    with pytest.raises(OrthoFxError, match=r"4294967295 x 4294967295 x 4294967295 values: that takes .* of memory"):
        IDX(tmp_path)
