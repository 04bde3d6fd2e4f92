import json
import os
import pickle

import numpy as np
import pytest
import torch

from ortho_fx import OrthoFxError
from ortho_fx.models.data.loader import load_validation
from ortho_fx.models.data.text import StandardLibrary, TextFiles, TokenFile, TokenFiles, text_files


def write_tokens(folder, train=1000, validation=300, dtype="uint16", meta=None):
    folder.mkdir(exist_ok=True)
    for name, count in (("train.bin", train), ("val.bin", validation)):
        np.arange(count, dtype=np.dtype(dtype).newbyteorder("<")).tofile(folder / name)
    if meta is not None:
        (folder / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return folder


def test_the_standard_library_is_python_source():
    data = StandardLibrary(context=32)
    assert len(data.train_tokens) > 5_000_000
    assert len(data.validation_tokens) > 300_000
    assert b"def __init__(self" in data.train_tokens.tobytes()
    assert data.validation_tokens[:200].tobytes() not in data.train_tokens.tobytes()
    assert (data.vocabulary, data.bytes_per_token) == (256, 1.0)
    assert sum(len(inputs) for inputs, _ in load_validation(data, size=16)) == 320


def test_validation_windows_do_not_overlap_and_are_as_many_as_the_text_holds(tmp_path):
    data = TokenFiles(write_tokens(tmp_path, validation=100), context=32)
    (batch,) = load_validation(data, size=4)
    kept = batch[1][batch[1][:, 0] != -100]
    assert len(kept) == 3
    assert len(kept.flatten().unique()) == kept.numel()
    assert (kept.min(), kept.max()) == (1, 99)
    one = TokenFiles(write_tokens(tmp_path, validation=33), context=32)
    assert torch.equal(next(load_validation(one, size=1))[1][0], torch.arange(1, 33))


def test_windows_reach_every_token(tmp_path):
    data = TokenFiles(write_tokens(tmp_path, train=40), context=32)
    starts = data.batch(0, 0, 500)[0][:, 0]
    assert sorted(set(starts.tolist())) == list(range(8))


@pytest.mark.parametrize(("files", "train", "held"), [(1, b"0" * 90, b"0" * 10), (3, None, None), (11, None, None)])
def test_the_split_of_text_files(tmp_path, files, train, held):
    for number in range(files):
        (tmp_path / f"{number:02}.txt").write_bytes(b"%x" % number * 100)
    data = TextFiles(tmp_path, context=4)
    if files == 11:
        held, train = b"9" * 100, b"".join(b"%x" % number * 100 for number in range(11) if number != 9)
    elif files == 3:
        train, held = (b"".join(b"%x" % n * count for n in range(3)) for count in (90, 10))
    assert data.train_tokens.tobytes() == train
    assert data.validation_tokens.tobytes() == held
    assert data.name == f"text of {files} file{'s' * (files > 1)}, {len(train)} train, {len(held)} val"


def test_hidden_empty_and_binary_files_are_no_text(tmp_path):
    for name, content in (
        ("b.txt", b"text"),
        ("a/c.py", b"code"),
        ("d.txt", b""),
        ("e.bin", b"\x00\x01"),
        (".f", b"x"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    assert text_files(tmp_path) == [tmp_path / "b.txt", tmp_path / "a" / "c.py"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "absent does not exist"),
        ("empty", "empty holds no text files"),
        ("binary", "binary is empty or binary"),
    ],
)
def test_without_text(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\x00")
    with pytest.raises(OrthoFxError, match=message):
        text_files(tmp_path / name)


def test_a_text_too_short_for_a_window(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(OrthoFxError, match=r"a window takes 17 tokens, context and a target; validation has 10 \(text"):
        TextFiles(tmp_path, context=16)
    with pytest.raises(
        OrthoFxError, match=r"takes 1025 tokens, context and a target; training has 1000 \(tokens, 1000"
    ):
        TokenFiles(write_tokens(tmp_path / "tokens"), context=1024)


def test_token_files_as_nanogpt_writes_them(tmp_path):
    data = TokenFiles(write_tokens(tmp_path), context=8)
    assert data.name == "tokens, 1000 train, 300 val"
    assert (data.vocabulary, data.bytes_per_token) == (None, None)
    inputs, targets = data.batch(0, 0, 4)
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))


def test_meta_json_tells_type_and_vocabulary(tmp_path):
    meta = {"vocabulary": 70_000, "dtype": "uint32", "tokenizer": "tokenizer.json", "bytes_per_token": 4.5}
    write_tokens(tmp_path, dtype="uint32", meta=meta)
    (np.arange(1000, dtype="<u4") + 69_000).tofile(tmp_path / "train.bin")
    data = TokenFiles(tmp_path, context=8)
    assert (data.vocabulary, data.bytes_per_token) == (70_000, 4.5)
    assert data.batch(0, 0, 4)[0].min() >= 69_000


def test_a_token_outside_of_the_vocabulary(tmp_path):
    data = TokenFiles(write_tokens(tmp_path, meta={"vocabulary": 300, "dtype": "uint16"}), context=8)
    with pytest.raises(
        OrthoFxError, match=r"token ids must be below the vocabulary, 300; got \d+ \(tokens, 1000 train"
    ):
        data.batch(0, 0, 100)
    assert len(list(load_validation(data, size=8))) == 5


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("{", "meta.json is not JSON"),
        ([], "meta.json must be an object with vocabulary and dtype; got list"),
        ({"dtype": "uint16"}, "vocabulary in .*meta.json must be a whole number from 1 up; got None"),
        ({"vocabulary": 10, "dtype": "int64"}, "dtype in .*meta.json must be 'uint16' or 'uint32'; got 'int64'"),
        ({"vocabulary": 10, "dtype": "uint16", "bytes_per_token": 0}, "must be a number above zero; got 0"),
        (
            {"vocabulary": 5000, "dtype": "uint16", "train_tokens": 1001},
            "train.bin must hold 1001 tokens, as .*meta.json says; it holds 1000",
        ),
    ],
)
def test_meta_json_that_is_wrong(tmp_path, meta, message):
    with pytest.raises(OrthoFxError, match=message):
        TokenFiles(write_tokens(tmp_path, meta=meta), context=8)


def test_token_files_that_are_damaged(tmp_path):
    write_tokens(tmp_path)
    with (tmp_path / "train.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(OrthoFxError, match=r"train.bin must hold integers of 2 bytes each; it has 2001 bytes"):
        TokenFiles(tmp_path, context=8)
    (tmp_path / "train.bin").unlink()
    with pytest.raises(OrthoFxError, match=r"cannot read .*train.bin: No such file or directory"):
        TokenFiles(tmp_path, context=8)


def test_a_worker_gets_the_path_and_not_the_tokens(tmp_path):
    data = TokenFiles(write_tokens(tmp_path, train=60_000), context=8)
    batch = data.batch(0, 0, 4)
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000
    assert torch.equal(pickle.loads(pickled).batch(0, 0, 4)[0], batch[0])


def test_a_file_that_shrinks_before_it_is_read(tmp_path):
    data = TokenFiles(write_tokens(tmp_path), context=8)
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(OrthoFxError, match=r"train.bin changed while it was read"):
        data.batch(0, 0, 4)


def test_a_token_file_that_shrinks_is_an_error(tmp_path):
    path = tmp_path / "train.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    tokens = TokenFile(path, "uint16")
    assert tokens[990:1000].tolist() == list(range(990, 1000))
    os.truncate(path, 100)
    assert tokens[10:20].tolist() == list(range(10, 20))
    with pytest.raises(OrthoFxError, match="changed while it was read: it held 1000 tokens, and"):
        tokens[990:1000]
    assert pickle.loads(pickle.dumps(tokens))[0:2].tolist() == [0, 1]
