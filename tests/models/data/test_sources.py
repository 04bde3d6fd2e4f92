import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ortho_fx import OrthoFxError
from ortho_fx.models.data.images import IDX, Digits, ImageFolder
from ortho_fx.models.data.loader import load_validation
from ortho_fx.models.data.sources import DataConfig, open_data
from ortho_fx.models.data.text import StandardLibrary, TextFiles, TokenFiles

CONTEXT = 16


@pytest.fixture
def sources(tmp_path):
    """A small source of each kind."""
    generator = np.random.default_rng(0)
    (tmp_path / "one.txt").write_text("to be or not to be\n" * 100)
    for number in range(12):
        path = tmp_path / "texts" / f"part{number % 3}" / f"{number}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"chapter {number}\n" * 20)
    (tmp_path / "tokens").mkdir()
    for name, count in (("train.bin", 500), ("val.bin", 200)):
        generator.integers(0, 50257, count).astype("<u2").tofile(tmp_path / "tokens" / name)
    (tmp_path / "idx").mkdir()
    for split, count in (("train", 40), ("t10k", 12)):
        pixels, labels = generator.integers(0, 256, (count, 9, 9)), np.arange(count) % 4
        for name, values in ((f"{split}-images-idx3-ubyte", pixels), (f"{split}-labels-idx1-ubyte", labels)):
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">u4").tobytes()
            (tmp_path / "idx" / name).write_bytes(header + values.astype(np.uint8).tobytes())
    for split, count in (("train", 9), ("val", 5)):
        for label in ("cat", "dog"):
            folder = tmp_path / "folder" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (20, 30, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


TOKENS = {"standard-library": StandardLibrary, "one.txt": TextFiles, "texts": TextFiles, "tokens": TokenFiles}
IMAGES = {"digits": Digits, "idx": IDX, "folder": ImageFolder}


def path_of(source, sources):
    return source if source in ("standard-library", "digits") else str(sources / source)


def open_source(source, sources, **settings):
    if source in TOKENS:
        return open_data(DataConfig(path_of(source, sources), context=CONTEXT, **settings), "tokens")
    settings |= {"image_size": 12} if source == "folder" else {}
    return open_data(DataConfig(path_of(source, sources), **settings), "images")


@pytest.mark.parametrize("source", [*TOKENS, *IMAGES])
def test_each_source_is_recognised_and_keeps_to_the_protocol(source, sources):
    data = open_source(source, sources)
    assert type(data) is (TOKENS | IMAGES)[source]
    assert str(sources) not in data.name
    inputs, targets = data.batch(0, 0, 6)
    if data.kind == "tokens":
        assert inputs.shape == targets.shape == (6, CONTEXT)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    else:
        assert inputs.shape == (6, data.channels, data.image_size, data.image_size)
        assert inputs.dtype == torch.float32
        assert targets.shape == (6,)
        assert targets.dtype == torch.int64
        assert 0 <= targets.min() <= targets.max() < data.classes


@pytest.mark.parametrize("source", [*TOKENS, *IMAGES])
def test_a_row_depends_on_seed_step_and_its_number_alone(source, sources):
    data = open_source(source, sources)
    whole = data.batch(3, 5, 8)
    for again in (data.batch(3, 5, 8), pickle.loads(pickle.dumps(data)).batch(3, 5, 8)):
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for splits in ([slice(0, 4), slice(4, 8)], [slice(0, 1), slice(1, 8)]):
        parts = [data.batch(3, 5, 8, rows) for rows in splits]
        assert all(torch.equal(torch.cat(p), w) for p, w in zip(zip(*parts, strict=True), whole, strict=True))
    assert not torch.equal(whole[0], data.batch(3, 6, 8)[0])
    assert not torch.equal(whole[0], data.batch(4, 5, 8)[0])


@pytest.mark.parametrize("source", [*TOKENS, *IMAGES])
def test_validation_is_the_same_for_any_batch_size_and_split(source, sources):
    data = open_source(source, sources, validation_samples=7)
    batches = list(load_validation(data, size=4))
    assert [len(inputs) for inputs, _ in batches] == [4, 4]
    inputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    assert (targets[7:] == -100).all()
    assert (targets[:7] >= 0).all()
    again = [torch.cat(column)[:7] for column in zip(*load_validation(data, size=3), strict=True)]
    assert torch.equal(again[0], inputs[:7])
    assert torch.equal(again[1], targets[:7])
    halves = [list(load_validation(data, size=4, rows=rows)) for rows in (slice(0, 2), slice(2, 4))]
    for batch, *parts in zip(batches, *halves, strict=True):
        assert all(torch.equal(torch.cat(p), b) for p, b in zip(zip(*parts, strict=True), batch, strict=True))


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("idx", "tokens", "idx holds images, and the model takes tokens: standard-library, a folder with train.bin"),
        ("digits", "tokens", "digits holds images, and the model takes tokens"),
        (
            "tokens",
            "images",
            "tokens holds tokens, and the model takes images: digits, a folder with train-images-idx3",
        ),
        ("absent", "tokens", "absent', which does not exist"),
        ("empty", "images", "images is digits, .* or a folder with images in train/CLASS/ .*, which is none of them"),
        ("pixels.raw", "tokens", "pixels.raw', which is none of them"),
    ],
)
def test_what_is_not_accepted_is_answered_with_what_is(source, kind, message, sources):
    (sources / "empty").mkdir()
    (sources / "pixels.raw").write_bytes(bytes(100))
    with pytest.raises(OrthoFxError, match=message):
        open_data(DataConfig(path_of(source, sources), context=CONTEXT if kind == "tokens" else None), kind)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("one.txt", {}, "data of tokens needs a context"),
        ("one.txt", {"context": 16, "mixup": 0.2}, "mixup is a setting of images; got 0.2"),
        ("digits", {"context": 16}, "context is a setting of tokens; got 16 for digits"),
        ("idx", {"image_size": 10}, "those of .*idx have 9 pixels a side, got 10"),
        ("digits", {"augment": "flip"}, "augment of digits of scikit-learn must be one of light, none; got 'flip'"),
        ("idx", {"augment": "crop"}, "must be one of light, flip, none; got 'crop'"),
        ("folder", {"augment": "light"}, "must be one of crop, randaugment, none; got 'light'"),
    ],
)
def test_settings_that_the_data_does_not_have(source, settings, message, sources):
    with pytest.raises(OrthoFxError, match=message):
        open_data(DataConfig(path_of(source, sources), **settings), "tokens" if source in TOKENS else "images")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 0}, "context must be 1 or more; got 0"),
        ({"image_size": -1}, "image_size must be 1 or more; got -1"),
        ({"validation_samples": 0}, "validation_samples must be 1 or more; got 0"),
        ({"mixup": -0.1}, "mixup must be a finite number from 0 up; got -0.1"),
        ({"cutmix": float("nan")}, "cutmix must be a finite number from 0 up; got nan"),
        ({"augment": "cut"}, "augment must be one of none, light, flip, crop, randaugment; got 'cut'"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(OrthoFxError, match=message):
        DataConfig("digits", **settings)


@pytest.mark.parametrize("source", ["one.txt", "texts", "tokens", "idx", "folder"])
def test_the_name_goes_with_the_content_wherever_it_is(source, sources, tmp_path):
    name = open_source(source, sources).name
    moved = tmp_path / "moved"
    moved.mkdir()
    (sources / source).rename(moved / source)
    assert open_source(source, moved).name == name
    if (moved / source).is_dir():
        file = max(path for path in (moved / source).rglob("*") if path.is_file() and "labels" not in path.name)
    else:
        file = moved / source
    content = file.read_bytes()
    if source == "idx":
        content = content[:-1] + bytes([content[-1] ^ 1])  # this file's length is fixed, unlike that of the others
    else:
        content += content[-2:]
    file.write_bytes(content)
    assert open_source(source, moved).name != name
