"""What the tokens of a run mean follows from its data, or is asked for."""

import json

import pytest
import tokenizers

from ortho_fx import OrthoFxError
from ortho_fx.models.data.prepare import prepare
from ortho_fx.models.data.vocabulary import Bytes, TokenizerFile, vocabulary_of
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.models.weights.bundle import save_weights

TEXT = "A word, a word: épée.\n" * 60


@pytest.fixture
def run(tmp_path):
    def saved(data):
        description = {} if data is None else {"run": {"data": str(data)}}
        save_weights(GPT2(GPT2Config(11, 8, 1, 2, 8)), tmp_path / "run" / "model.safetensors", description)
        return tmp_path / "run"

    return saved


def test_text_is_bytes(run, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    for data in ("standard-library", tmp_path / "text", tmp_path / "text" / "a.txt"):
        assert isinstance(vocabulary_of(run(data)), Bytes)
    assert Bytes().encode("é") == [0xC3, 0xA9]
    assert Bytes().decode([0xC3, 0xA9, 0xC3, 65]) == "é\ufffdA"


def test_prepared_tokens_name_their_tokenizer(run, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    prepare(tmp_path / "a.txt", tmp_path / "bytes")
    assert isinstance(vocabulary_of(run(tmp_path / "bytes")), Bytes)
    prepare(tmp_path / "a.txt", tmp_path / "bpe", tokenizer="bpe", vocabulary=300)
    found = vocabulary_of(run(tmp_path / "bpe"))
    meta = json.loads((tmp_path / "bpe" / "meta.json").read_text())
    assert (found.size, found.end) == (meta["vocabulary"], meta["end_of_text"])
    ids = found.encode(TEXT)
    assert len(ids) < len(TEXT.encode())
    assert ids == tokenizers.Tokenizer.from_file(str(tmp_path / "bpe" / "tokenizer.json")).encode(TEXT).ids
    assert found.decode(ids) == TEXT
    # What is asked for comes first, and beside weights without a run lies their tokenizer.
    assert isinstance(vocabulary_of(run(tmp_path / "bpe"), "bytes"), Bytes)
    assert isinstance(vocabulary_of(tmp_path / "run", str(tmp_path / "bpe" / "tokenizer.json")), TokenizerFile)
    weights = run(None)
    (weights / "tokenizer.json").write_bytes((tmp_path / "bpe" / "tokenizer.json").read_bytes())
    assert vocabulary_of(weights / "model.safetensors").encode(TEXT) == ids


def test_what_is_not_known_is_asked_for(run, tmp_path):
    way_out = "say it by --tokenizer: bytes, or a tokenizer.json"
    weights = tmp_path / "run"
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "train.bin").write_bytes(b"")
    expected = {
        None: f"{weights} does not tell what its tokens mean: {way_out}",
        tmp_path / "gone": f"{weights} was trained on {tmp_path}/gone, which is not here and would tell its tokens: "
        f"{way_out}",
        tmp_path / "tokens": f"{weights} was trained on the tokens in {tmp_path}/tokens, which has no tokenizer: "
        f"{way_out}",
    }
    for data, message in expected.items():
        with pytest.raises(OrthoFxError) as caught:
            vocabulary_of(run(data))
        assert str(caught.value) == message
    with pytest.raises(OrthoFxError, match="there is no tokenizer nope: --tokenizer is bytes"):
        vocabulary_of(run(None), "nope")
