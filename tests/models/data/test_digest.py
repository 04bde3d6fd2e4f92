import numpy as np
import pytest
from PIL import Image

from ortho_fx.models.data import digest
from ortho_fx.models.data.digest import data_digest
from ortho_fx.models.data.images import Digits, ImageFolder, Settings
from ortho_fx.models.data.text import TextFiles, TokenFiles


def tokens(folder, changed=None):
    folder.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        values = np.arange(5000) % 250
        if changed == name:
            values[2500] += 1
        values.astype("<u2").tofile(folder / name)
    return TokenFiles(folder, 16)


def images(root, shade=0):
    for split in ("train", "val"):
        for label in "ab":
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(3):
                Image.new("RGB", (4, 4), (shade, number, 0)).save(folder / f"{number}.bmp")
    return ImageFolder(root, Settings(), image_size=4)


def test_data_of_one_name_and_other_content_have_other_digests(tmp_path):
    first = data_digest(tokens(tmp_path / "tokens"))
    assert data_digest(tokens(tmp_path / "moved")) == first
    for name in ("train.bin", "val.bin"):
        assert data_digest(tokens(tmp_path / "tokens", name)) != first
    text = tmp_path / "text"
    digests = set()
    for content in ("a" * 5000, "a" * 4999 + "b", "b" + "a" * 4999):
        text.write_text(content)
        digests.add(data_digest(TextFiles(text, 16)))
    assert len(digests) == 3
    folder = images(tmp_path / "images")
    assert data_digest(images(tmp_path / "same")) == data_digest(folder)
    assert images(tmp_path / "others", 1).name == folder.name
    assert data_digest(images(tmp_path / "others", 1)) != data_digest(folder)


def test_arrays_in_memory_have_a_digest():
    first, second = Digits(), Digits()
    assert data_digest(first) == data_digest(second)
    second.train_labels = second.train_labels[::-1]
    assert data_digest(first) != data_digest(second)


@pytest.mark.parametrize("samples", [1, 7])
def test_large_data_are_sampled(tmp_path, monkeypatch, samples):
    monkeypatch.setattr(digest, "WHOLE", 100)
    monkeypatch.setattr(digest, "_SAMPLES", samples)
    monkeypatch.setattr(digest, "_BLOCK", 1000)
    assert data_digest(tokens(tmp_path / "tokens")) == data_digest(tokens(tmp_path / "moved"))
    assert data_digest(images(tmp_path / "images")) != data_digest(images(tmp_path / "others", 1))
