"""Files are written whole or not at all; a file that cannot be read gives an error of one line."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save

from ortho_fx import OrthoFxError
from ortho_fx.tensor_files import files_of, read_json, read_safetensors, read_tensors, with_digest


def test_a_state_dict_is_unwrapped(tmp_path):
    state = {"a": torch.ones(2)}
    for i, content in enumerate((state, {"model": state, "epoch": 3}, {"state_dict": state})):
        torch.save(content, tmp_path / f"{i}.pth")
        read = read_tensors(tmp_path / f"{i}.pth")
        assert torch.equal(read.tensors["a"], state["a"])
        assert read.metadata == {}


def test_files_that_hold_no_state_dict_are_named(tmp_path):
    def error(name):
        with pytest.raises(OrthoFxError) as caught:
            read_tensors(tmp_path / name)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(tmp_path), "HERE")

    assert error("none.pt") == "there is no file HERE/none.pt"
    assert error("none.safetensors") == "there is no file HERE/none.safetensors"
    assert error("a.onnx") == "weights are files in .safetensors, .bin, .pth, .pt; got HERE/a.onnx"
    for content in (b"", b"abc", b"x" * 100, (8).to_bytes(8, "little") + b'{"a":1}x'):
        (tmp_path / "bad.safetensors").write_bytes(content)
        assert error("bad.safetensors").startswith("HERE/bad.safetensors is not a readable safetensors file: ")
        (tmp_path / "bad.bin").write_bytes(content)
        assert error("bad.bin").startswith("HERE/bad.bin is not readable: ")
    (tmp_path / "object.pt").write_bytes(pickle.dumps(object(), protocol=2))
    assert error("object.pt") == "HERE/object.pt is not readable: it is damaged, or holds more than tensors"
    torch.save([1], tmp_path / "list.pt")
    assert error("list.pt") == "HERE/list.pt holds a list, not a state dict"
    torch.save({"a": torch.ones(1), "b": 3}, tmp_path / "three.pt")
    assert error("three.pt") == "HERE/three.pt holds no state dict: b is a int, not a tensor"


def test_tensors_do_not_change_with_their_file(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(4)}, tmp_path / "file.safetensors")
    tensors = read_safetensors(tmp_path / "file.safetensors").tensors
    with (tmp_path / "file.safetensors").open("rb+") as file:
        file.seek(-16, os.SEEK_END)
        file.write(bytes(16))
    assert torch.equal(tensors["a"], torch.ones(4))


def test_no_flipped_bit_is_loaded(tmp_path):
    """Each byte of a file with a digest, one bit flipped: an error, or, in the digest's own name, the same content."""
    path = tmp_path / "file.safetensors"
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64)
    tensors = {str(dtype): torch.ones(3, 2).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 3)}
    metadata = {"step": "120", "description": '{"degree": 3}'}
    whole = save(tensors, with_digest(tensors, metadata))
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            read = read_safetensors(path)
        except OrthoFxError:
            refused += 1
            continue
        assert {key: read.metadata[key] for key in metadata} == metadata, place
        assert read.tensors.keys() == tensors.keys()
        assert all(torch.equal(read.tensors[name], tensors[name]) for name in tensors), place
    assert len(whole) - refused <= len("ortho_fx.sha256")


def test_a_digest_covers_what_is_not_read_and_may_be_missing(tmp_path):
    path = tmp_path / "file.safetensors"
    tensors = {"a": torch.ones(4), "b": torch.zeros(4)}
    metadata = with_digest(tensors, {"step": "1"})
    path.write_bytes(save(tensors, metadata))
    read = read_safetensors(path, only=lambda names: ["b"])
    assert (list(read.tensors), read.metadata) == (["b"], {"step": "1"})
    path.write_bytes(save({**tensors, "a": 2 * tensors["a"]}, metadata))
    with pytest.raises(
        OrthoFxError,
        match=r"file\.safetensors is damaged: its content has changed since it was written; bring it back from a copy "
        r"\(if you changed it yourself, remove ortho_fx\.sha256 from its metadata\)$",
    ):
        read_safetensors(path, only=lambda names: ["b"])
    path.write_bytes(save({**tensors, "a": 2 * tensors["a"]}, {"step": "1"}))
    assert read_safetensors(path).tensors["a"].tolist() == [2, 2, 2, 2]


def test_the_weights_of_a_folder(tmp_path):
    def error():
        with pytest.raises(OrthoFxError) as caught:
            files_of(tmp_path)
        return str(caught.value).replace(str(tmp_path), "HERE")

    assert files_of(tmp_path / "file.pt") == [tmp_path / "file.pt"]
    assert error() == (
        "HERE holds no weights: none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, "
        "pytorch_model.bin.index.json"
    )
    (tmp_path / "run.json").write_text("{}")
    lacks = "HERE has no model.safetensors: a run writes it at its end; "
    assert error() == lacks + "this one has saved no checkpoint yet, so start it again"
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    assert error() == lacks + "go on with --resume"
    index = tmp_path / "pytorch_model.bin.index.json"
    for content in ({}, {"weight_map": {"a": "../a.bin"}}, {"weight_map": {"a": "/a.bin"}}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(content))
        assert error() == f"HERE/{index.name} must map names to files beside it, under weight_map"
    index.write_text(json.dumps({"weight_map": {"a": "2.bin", "b": "1.bin", "c": "2.bin"}}))
    assert files_of(tmp_path) == [tmp_path / "1.bin", tmp_path / "2.bin"]
    for name in ("pytorch_model.bin", "model.safetensors"):  # each takes precedence over the earlier ones
        (tmp_path / name).touch()
        assert files_of(tmp_path) == [tmp_path / name]


def test_json_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "config.json"
    for content, message in (("[1]", "must hold a JSON object; it holds a list"), ("{", "cannot read")):
        path.write_text(content)
        with pytest.raises(OrthoFxError, match=message):
            read_json(path)
    with pytest.raises(OrthoFxError, match="No such file or directory"):
        read_json(tmp_path / "none.json")


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert read_tensors(tmp_path / "plain.pt").tensors["a"].shape == (1000,)
    with pytest.raises(OrthoFxError, match=r"packed.pt is not readable: it has \d+ bytes, and unpacks to"):
        read_tensors(tmp_path / "packed.pt")
