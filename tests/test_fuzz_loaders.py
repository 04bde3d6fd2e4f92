"""Every loader, given files that are cut, flipped or made up: the right values, or one `OrthoFxError` of one line."""

import hashlib
import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.data.images import IDX, ImageFolder, Settings
from ortho_fx.models.data.prepare import prepare
from ortho_fx.models.data.text import TokenFiles
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.models.recipe import TrainConfig, load_recipe
from ortho_fx.models.runs.files import read_run
from ortho_fx.models.training.checkpoint import load_checkpoint
from ortho_fx.models.training.processes import Processes
from ortho_fx.models.weights.bundle import load_model, save_weights

bounded = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def one_line_or(read):
    """What `read` returns, or None after an error of one line."""
    said = None
    try:
        return read()
    except OrthoFxError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    return None


@st.composite
def damaged(draw, content):
    """The content with some bytes flipped, a part cut out, or bytes added."""
    changed = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        changed[place] ^= draw(st.integers(1, 255))
    low, high = sorted(draw(st.tuples(*[st.integers(0, len(changed))] * 2)))
    kind = draw(st.sampled_from(["flip", "cut", "end", "grow"]))
    if kind == "cut":
        del changed[low:high]
    elif kind == "end":
        del changed[low:]
    elif kind == "grow":
        changed[low:low] = draw(st.binary(max_size=40))
    return bytes(changed)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _idx(count, side):
    images = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (count, side, side)) + bytes(count * side**2)
    return images, bytes((0, 0, 8, 1)) + count.to_bytes(4, "big") + bytes(k % 2 for k in range(count))


@bounded
@given(data=st.data(), which=st.integers(0, 1))
def test_idx(data, which, folder):
    files = list(_idx(6, 4))
    whole = files[which]
    files[which] = data.draw(damaged(whole))
    for split in ("train", "t10k"):
        for name, content in zip(("images-idx3", "labels-idx1"), files, strict=True):
            (folder / f"{split}-{name}-ubyte").write_bytes(content)
    read = one_line_or(lambda: IDX(folder, Settings()))
    assert read is None or len(read.train_labels) * read.image_size**2 == len(files[0]) - 16


_PICTURES = []
for _mode, _kind in (("RGB", "PNG"), ("I;16", "PNG"), ("L", "TIFF"), ("RGB", "JPEG"), ("1", "PPM")):
    _buffer = io.BytesIO()
    Image.new(_mode, (9, 7), 1).save(_buffer, _kind)
    _PICTURES.append(_buffer.getvalue())


@bounded
@given(data=st.data())
def test_images(data, folder):
    content = data.draw(st.sampled_from(_PICTURES).flatmap(damaged))
    for split in ("train", "val"):
        path = folder / "pictures" / split / "a" / "0.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    images = ImageFolder(folder / "pictures", Settings(augment="none"), image_size=4)
    batch = one_line_or(lambda: images.batch(0, 0, 1))
    assert batch is None or (batch[0].shape == (1, 3, 4, 4) and batch[0].isfinite().all())


@bounded
@given(tokens=st.binary(max_size=60), meta=st.none() | json_values | st.just({"vocabulary": 9, "dtype": "uint16"}))
def test_token_files(tokens, meta, folder):
    place = folder / "tokens"
    place.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        (place / name).write_bytes(tokens)
    (place / "meta.json").write_text(json.dumps(meta))
    if meta is None:
        (place / "meta.json").unlink()
    read = one_line_or(lambda: TokenFiles(place, 4))
    batch = None if read is None else one_line_or(lambda: read.batch(0, 0, 2))
    if batch is not None:
        content = np.frombuffer(tokens, "<u2").tolist()
        row = [*batch[0][0].tolist(), batch[1][0, -1].item()]
        assert any(content[start : start + 5] == row for start in range(len(content)))


def _tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return model.to_str().encode()


@bounded
@given(data=st.data())
def test_tokenizer_json(data, folder):
    (folder / "text.txt").write_text("a b a c\n" * 20)
    (folder / "tokenizer.json").write_bytes(data.draw(damaged(_tokenizer())))
    out = folder / "prepared"
    report = one_line_or(lambda: prepare(folder / "text.txt", out, tokenizer=folder / "tokenizer.json", overwrite=True))
    assert report is None or (out / "train.bin").stat().st_size in (2 * report.train_tokens, 4 * report.train_tokens)


@pytest.fixture(scope="module")
def weights(folder):
    save_weights(GPT2(GPT2Config(16, 8, 1, 2, 8)), folder / "w.safetensors", {})
    return (folder / "w.safetensors").read_bytes()


@bounded
@given(data=st.data())
def test_weights(data, folder, weights):
    start = 8 + int.from_bytes(weights[:8], "little")
    (folder / "d.safetensors").write_bytes(data.draw(damaged(weights[:start])) + weights[start:])
    one_line_or(lambda: load_model(folder / "d.safetensors"))


@bounded
@given(
    key=st.sampled_from(["model", "config", "expansions", "channels", "description", "layers", "heads", "width"]),
    value=json_values | st.sampled_from([-1, 0, 10**9, 10**30, 1.5, math.nan, True, "4", [4]]),
)
def test_metadata_of_weights(key, value, folder, weights):
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    described = json.loads(header["__metadata__"]["ortho_fx"])
    (described["config"] if key in described["config"] else described)[key] = value
    tensors = {name: tensor.clone() for name, tensor in GPT2(GPT2Config(16, 8, 1, 2, 8)).state_dict().items()}
    del tensors["head.weight"]
    (folder / "m.safetensors").write_bytes(save(tensors, {"format": "pt", "ortho_fx": json.dumps(described)}))
    model = one_line_or(lambda: load_model(folder / "m.safetensors"))
    assert model is None or sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors.values())


_STATE = {"version": 2, "step": 1, "skipped": 0, "configuration": {}, "data": "0", "rows": {}, "files": {}}


@bounded
@given(data=st.data(), key=st.sampled_from(sorted(_STATE)), value=json_values, seal=st.booleans())
def test_state_json(data, key, value, seal, folder):
    place = folder / "checkpoints" / "step-00000001"
    place.mkdir(parents=True, exist_ok=True)
    described = {**_STATE, key: value}
    digest = hashlib.sha256(json.dumps(described, indent=1).encode()).hexdigest()
    content = (json.dumps({**described, "sha256": digest}, indent=1) + "\n").encode()
    (place / "state.json").write_bytes(content if seal else data.draw(damaged(content)))
    alone = Processes(0, 1, torch.device("cpu"))
    assert one_line_or(lambda: load_checkpoint(place.parent, {}, {"model": {}}, alone, data="0")) is None  # no tensors


_RECIPE = b'model = "gpt2"\nsteps = 30\nlr = 0.002\nbasis = "fourier"\ndegree = 3\ncompile = false\nclip = inf\n'


@bounded
@given(content=damaged(_RECIPE))
def test_recipes(content, folder):
    (folder / "r.toml").write_bytes(content)
    config = one_line_or(lambda: TrainConfig.from_values(load_recipe(str(folder / "r.toml"))))
    assert config is None or (config.steps >= 1 and config.lr >= 0)


@bounded
@given(rows=damaged(b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": null}\n'), config=json_values)
def test_files_of_a_run(rows, config, folder):
    (folder / "run.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_bytes(rows)
    run = one_line_or(lambda: read_run(folder))
    assert run is None or all(type(row["step"]) is int for row in run.rows)


@pytest.mark.parametrize("text", ["[" * 5000, "9" * 5000, '{"a":' * 5000, "\ud800", "NaN", ""])
def test_text_that_breaks_parsers(text, folder):
    content = text.encode("utf-8", "surrogatepass")
    for name in ("run.json", "metrics.jsonl", "tokens/meta.json", "r.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "tokens" / "train.bin").write_bytes(bytes(40))
    one_line_or(lambda: read_run(folder))
    one_line_or(lambda: TokenFiles(folder / "tokens", 4))
    one_line_or(lambda: load_recipe(str(folder / "r.toml")))
