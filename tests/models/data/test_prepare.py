import errno
import json
import sys
import tracemalloc

import numpy as np
import pytest

from ortho_fx import OrthoFxError
from ortho_fx.models.data import prepare as module
from ortho_fx.models.data.prepare import END_OF_TEXT, prepare
from ortho_fx.models.data.text import STANDARD_LIBRARY, TokenFiles, text_files

WORDS = "der die das und wenn dann größer kleiner 你好 🙂 def return self.weight = 3.14 \t #".split(" ")


def write_texts(folder, files=20, lines=40):
    """Writes text with indents, empty lines, both kinds of line ends and characters of one to four bytes."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(files):
        rows = [" " * generator.integers(0, 9) + " ".join(generator.choice(WORDS, 6)) for _ in range(lines)]
        rows[::7] = [""] * len(rows[::7])
        text = ("\r\n" if number % 5 == 4 else "\n").join([f"file {number}", *rows])
        (folder / f"{number:02}.txt").write_bytes(text.encode())
    return folder


def read(out):
    meta = json.loads((out / "meta.json").read_text())
    train, held = (
        np.fromfile(out / name, np.dtype(meta["dtype"]).newbyteorder("<")) for name in ("train.bin", "val.bin")
    )
    return meta, train, held


def tokenizer_of(out):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(out / "tokenizer.json"))


def documents(ids, meta, out):
    """The documents between end-of-text tokens."""
    ends = np.flatnonzero(ids == meta["end_of_text"])
    assert ends[-1] == len(ids) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer_of(out).decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def test_bytes_of_whole_files_in_two_splits(tmp_path):
    source, out = write_texts(tmp_path / "texts"), tmp_path / "out"
    report = prepare(source, out)
    meta, train, held = read(out)
    texts = [path.read_bytes() for path in sorted(source.iterdir())]
    assert held.dtype == np.uint16
    inside = [text for text in texts if text in held.astype(np.uint8).tobytes()]
    assert len(inside) == 2
    assert held.astype(np.uint8).tobytes() == b"".join(inside)
    assert train.astype(np.uint8).tobytes() == b"".join(text for text in texts if text not in inside)
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    counts = {"train_tokens": len(train), "validation_tokens": len(held)}
    expected = {"vocabulary": 256, "dtype": "uint16", "tokenizer": "bytes", "end_of_text": None, "bytes_per_token": 1.0}
    assert meta == expected | counts
    assert (report.train_bytes, report.validation_bytes) == (len(train), len(held))
    data = TokenFiles(out, context=16)
    assert (data.vocabulary, data.bytes_per_token) == (256, 1.0)


def test_bpe_gives_the_text_back_and_documents_end(tmp_path):
    source, out = write_texts(tmp_path / "texts"), tmp_path / "out"
    report = prepare(source, out, tokenizer="bpe", vocabulary=300)
    meta, train, held = read(out)
    texts = {path.read_bytes().decode() for path in source.iterdir()}
    split = [set(documents(ids, meta, out)) for ids in (train, held)]
    assert split[0] | split[1] == texts
    assert not split[0] & split[1]
    assert [len(part) for part in split] == [18, 2]
    assert (meta["vocabulary"], meta["tokenizer"]) == (300, "tokenizer.json")
    size = sum(len(text.encode()) for text in split[1])
    assert meta["bytes_per_token"] == report.bytes_per_token == size / len(held) > 1.3
    assert max(train.max(), held.max()) < 300
    assert TokenFiles(out, context=16).bytes_per_token == meta["bytes_per_token"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_seed_chooses_the_files(tmp_path, tokenizer):
    source = write_texts(tmp_path / "texts")
    files = {}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(source, tmp_path / out, tokenizer=tokenizer, vocabulary=300, validation_share=0.2, seed=seed)
        files[out] = [(tmp_path / out / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")]
    assert files["a"] == files["b"]
    assert files["a"] != files["c"]


def test_pieces_make_the_tokens_of_the_whole(tmp_path, monkeypatch):
    source, outs = write_texts(tmp_path / "texts"), [tmp_path / "whole", tmp_path / "pieces"]
    prepare(source, outs[0], tokenizer="bpe", vocabulary=400)
    monkeypatch.setattr(module, "_PIECE", 300)
    monkeypatch.setattr(module, "_PIECES_AT_ONCE", 3)
    prepare(source, outs[1], tokenizer=outs[0] / "tokenizer.json")
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_text_without_ends_of_lines_is_cut_between_characters(tmp_path, monkeypatch):
    text = "你好🙂x" * 400
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "_PIECE", 97)
    prepare(tmp_path / "text.txt", tmp_path / "out", tokenizer="bpe", vocabulary=260)
    meta, train, held = read(tmp_path / "out")
    assert "".join(documents(np.concatenate([train, held]), meta, tmp_path / "out")) == text


def test_few_files_are_cut_at_the_end_of_a_line(tmp_path):
    source, out = tmp_path / "text.txt", tmp_path / "out"
    source.write_text("".join(f"line {number}\n" for number in range(1000)))
    report = prepare(source, out, validation_share=0.25)
    _, train, held = read(out)
    assert train.astype(np.uint8).tobytes() + held.astype(np.uint8).tobytes() == source.read_bytes()
    assert held[:5].astype(np.uint8).tobytes() == b"line "
    assert abs(report.validation_bytes / source.stat().st_size - 0.25) < 0.01


def test_the_name_of_the_end_of_text_is_its_token(tmp_path):
    (tmp_path / "text.txt").write_text(f"once upon a time\n{END_OF_TEXT}\n" * 200)
    prepare(tmp_path / "text.txt", tmp_path / "out", tokenizer="bpe", vocabulary=280)
    meta, train, held = read(tmp_path / "out")
    assert (np.concatenate([train, held]) == meta["end_of_text"]).sum() == 202
    assert not any("endof" in token for token in tokenizer_of(tmp_path / "out").get_vocab() if token != END_OF_TEXT)


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, "far": 69_999, "near": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=3)
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text("near far\n" * 50)
    report = prepare(tmp_path / "text.txt", tmp_path / "out", tokenizer=tmp_path / "words.json")
    meta, train, held = read(tmp_path / "out")
    assert (meta["vocabulary"], meta["dtype"], meta["end_of_text"]) == (70_000, "uint32", None)
    assert np.concatenate([train, held]).tolist() == [1, 69_999] * 50
    assert str(report.vocabulary) == "70000"
    assert TokenFiles(tmp_path / "out", context=4).batch(0, 0, 4)[0].max() == 69_999


def test_the_report_in_a_few_lines(tmp_path):
    (tmp_path / "text.txt").write_text("0123456789\n" * 1000)
    report = prepare(tmp_path / "text.txt", tmp_path / "out")
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert lines == [
        "training 9,911 tokens of 9,911 bytes",
        "validation 1,089 tokens of 1,089 bytes",
        "vocabulary 256 as uint16, 1.000 bytes a validation token",
        f"written to {tmp_path / 'out'}",
    ]


def test_the_standard_library(tmp_path):
    report = prepare(STANDARD_LIBRARY, tmp_path)
    assert report.train_bytes + report.validation_bytes == sum(f.stat().st_size for f in text_files(STANDARD_LIBRARY))
    assert report.train_tokens > 5_000_000


def test_what_is_there_is_replaced_when_asked_only(tmp_path):
    source = write_texts(tmp_path / "texts")
    out = source / "out"
    prepare(source, out, tokenizer="bpe", vocabulary=300)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        OrthoFxError, match=r"out holds train.bin, val.bin, tokenizer.json, meta.json already: pass --over"
    ):
        prepare(source, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes").write_text("kept")
    prepare(source, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", "notes", "train.bin", "val.bin"]
    again = prepare(source, out, overwrite=True)
    assert again.train_bytes + again.validation_bytes == sum(p.stat().st_size for p in source.glob("*.txt")) + 4


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_a_link_in_the_place_of_an_unfinished_file_is_not_followed(tmp_path, name):
    (tmp_path / "text.txt").write_text("one line\n" * 200)
    other, out = tmp_path / "other", tmp_path / "out"
    other.write_text("untouched")
    out.mkdir()
    (out / f"{name}.partial").symlink_to(other)
    prepare(tmp_path / "text.txt", out)
    assert other.read_text() == "untouched"
    assert (out / name).is_file()
    assert not (out / name).is_symlink()


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    source, out = write_texts(tmp_path / "texts"), tmp_path / "out"
    prepare(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OrthoFxError, match=r"cannot prepare .*out: No space left on device"):
        prepare(source, out, overwrite=True)
    (source / "21.txt").write_bytes(b"caf\xe9")
    with pytest.raises(OrthoFxError, match=r"21.txt is not UTF-8 at byte 3; the tokenizer 'bytes' takes any text"):
        prepare(source, out, tokenizer="bpe", overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("placed", [0, 1, 2])
def test_a_preparation_that_ends_while_files_take_their_places_is_not_trained_on(tmp_path, monkeypatch, placed):
    source, out = write_texts(tmp_path / "texts"), tmp_path / "out"
    replace, done = module.Path.replace, []

    def ends(path, target):
        if len(done) == placed:
            raise OSError(errno.EIO, "Input/output error")
        done.append(target.name)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.Path, "replace", ends)
        with pytest.raises(OrthoFxError, match="Input/output error"):
            prepare(source, out)
    assert sorted(done) == sorted(path.name for path in out.iterdir())
    with pytest.raises(OrthoFxError, match=r"train\.bin"):
        TokenFiles(out, 8)
    prepare(source, out, overwrite=placed > 0)
    assert TokenFiles(out, 8).vocabulary == 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_share": 0.0}, "validation_share must be between 0 and 1; got 0.0"),
        ({"tokenizer": "bpe", "vocabulary": 256}, "vocabulary of bpe must be 257 or more, .*; got 256"),
        ({"tokenizer": "gpt2"}, "tokenizer must be bytes, bpe or the path of a tokenizer.json; got 'gpt2'"),
        ({"tokenizer": "texts/00.txt"}, "texts/00.txt is not a tokenizer.json: "),
        ({"source": "absent"}, "text is read from a text file or a folder of text files; absent does not exist"),
        ({"source": "short.txt"}, "training must have some of the text, .* none of 1 bytes in 1 files"),
        ({"out": "short.txt"}, "out must be a folder; short.txt is a file"),
    ],
)
def test_what_cannot_be_prepared(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts")
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(OrthoFxError, match=message):
        prepare(**{"source": "texts", "out": "out"} | settings)
    assert not list(tmp_path.glob("out/*"))


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(OrthoFxError, match=r"tokens other than bytes need tokenizers: pip install tokenizers"):
        prepare(write_texts(tmp_path / "texts"), tmp_path / "out", tokenizer="bpe")


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 2**14)
    (tmp_path / "text.txt").write_bytes(b"some words on a line\n" * 200_000)
    tracemalloc.start()
    prepare(tmp_path / "text.txt", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 < (tmp_path / "text.txt").stat().st_size / 4


def test_the_tokenizer_learns_from_pieces_of_a_large_text(tmp_path, monkeypatch):
    source = write_texts(tmp_path / "texts", files=40)
    for name, limit in (("all", 2**30), ("some", 5_000)):
        monkeypatch.setattr(module, "_LEARN_FROM", limit)
        prepare(source, tmp_path / name, tokenizer="bpe", vocabulary=300)
    merges = [
        json.loads((tmp_path / name / "tokenizer.json").read_text())["model"]["merges"] for name in ("all", "some")
    ]
    assert len(merges[1]) > 20
    assert merges[0] != merges[1]
