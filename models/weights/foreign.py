"""Writes our models for other libraries: GPT-2 as a folder of transformers, ConvNeXt as a folder of timm.

The names are those of the tables in `layouts.py`, read the other way. A folder is written under a temporary name beside
its own, loaded by the library that it is for, and compared with the model. Only then does it get its name.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.export import Export
from ortho_fx.files import reason
from ortho_fx.models import convnext
from ortho_fx.models.convnext import ConvNeXt
from ortho_fx.models.data.vocabulary import Bytes, Vocabulary
from ortho_fx.models.gpt2 import GPT2
from ortho_fx.models.weights.layouts import TIMM, TRANSFORMERS, names_in
from ortho_fx.modes import evaluating
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.rewriting.like import rewrite_like_
from ortho_fx.rewriting.sources import expansion_config
from ortho_fx.tensor_files import read_json, safetensors_library

# Tokens of the comparison, and the largest difference that rounding explains, relative to the largest logit.
_TOKENS, _TOLERANCE = 128, 1e-4
_TIMM_NAMES = {"t": "convnext_tiny", "s": "convnext_small", "b": "convnext_base", "l": "convnext_large"}
_STAGES, _PATCH = 4, 4


@dataclass(frozen=True)
class FolderExport(Export):
    """A folder that was written for another library; `advice` says how to load it, and what it lacks."""

    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *self.advice])


def export_transformers(model: nn.Module, out: str | Path, vocabulary: Vocabulary | None = None) -> FolderExport:
    """Writes a GPT-2 as a folder for `AutoModelForCausalLM.from_pretrained`.

    It holds config.json, generation_config.json, model.safetensors and, with a vocabulary, the tokenizer. A model
    without expansions loads in transformers alone. One with expansions, learnable or frozen, is in the format of
    `ortho_fx.integrations.transformers`, whose `enable` is called here, and has to be called before it is loaded.

    Args:
        model: a GPT-2 without gates.
        out: the folder; one that is there has to be empty.
        vocabulary: what its tokens mean; without one, the folder has no tokenizer.

    Returns:
        The folder, its size, and the difference of the logits that transformers computes from it.

    Raises:
        OrthoFxError: another model, a folder that holds files, no transformers, or logits that differ.
    """
    if not isinstance(model, GPT2):
        raise OrthoFxError(f"transformers takes a gpt2 of ours; a {type(model).__name__} goes to timm")
    if model.config.gated:
        raise OrthoFxError("transformers' GPT-2 has no gated MLPs, and this one has: export it to .onnx or .pt2")
    transformers = _library("transformers")
    expansions = any(isinstance(module, Expansion) for module in model.modules())
    if expansions:
        importlib.import_module("ortho_fx.integrations.transformers").enable()
    end = None if vocabulary is None else vocabulary.end
    ours = model.config
    config = transformers.GPT2Config(
        vocab_size=ours.vocabulary,
        n_positions=ours.context,
        n_embd=ours.width,
        n_layer=ours.layers,
        n_head=ours.heads,
        activation_function="gelu_new",
        resid_pdrop=ours.dropout,
        embd_pdrop=ours.dropout,
        attn_pdrop=ours.dropout,
        bos_token_id=end,
        eos_token_id=end,
    )
    theirs = transformers.GPT2LMHeadModel(config)
    _fill(theirs, model, names_in(TRANSFORMERS, model.state_dict()))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(ours.vocabulary, (1, min(ours.context, _TOKENS)), generator=generator)
    advice = [f'load it: transformers.AutoModelForCausalLM.from_pretrained("{out}")']
    if expansions:
        advice.insert(0, "before it is loaded: ortho_fx.integrations.transformers.enable()")
    with _new_folder(Path(out)) as folder:
        with _quiet(transformers):
            theirs.save_pretrained(folder)
            if vocabulary is None:
                advice.append("it has no tokenizer, since what its tokens mean is not known: --tokenizer FILE adds one")
            else:
                _write_tokenizer(transformers, vocabulary, ours.context, folder)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        difference = _difference(model, tokens, lambda: loaded(tokens).logits, "transformers")
        size = _size(folder)
    inputs = (f"tokens (batch, up to {ours.context}) int64",)
    return FolderExport(Path(out), size, inputs, *difference, f"transformers {transformers.__version__}", tuple(advice))


def export_timm(model: nn.Module, out: str | Path, image_size: int = 224) -> FolderExport:
    """Writes a ConvNeXt as a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    It holds config.json, with timm's name of the architecture and its arguments, and model.safetensors. timm has no
    expansions: a model with them needs `rewrite_like_` before its weights are loaded, and the advice says how. timm
    alone refuses its weights.

    Args:
        model: a ConvNeXt without gates, of four stages and patches of 4 pixels, as timm's.
        out: the folder; one that is there has to be empty.
        image_size: side of the images in pixels, for the folder's config.

    Returns:
        The folder, its size, and the difference of the logits that timm computes from it.

    Raises:
        OrthoFxError: another model, a folder that holds files, no timm or an old one, or logits that differ.
    """
    if not isinstance(model, ConvNeXt):
        raise OrthoFxError(f"timm takes a convnext of ours; a {type(model).__name__} goes to transformers")
    ours = model.config
    if ours.gated:
        raise OrthoFxError("timm's ConvNeXt has no gated MLPs, and this one has: export it to .onnx or .pt2")
    if len(ours.depths) != _STAGES or ours.patch != _PATCH:
        raise OrthoFxError(
            f"timm's ConvNeXt has {_STAGES} stages and patches of {_PATCH} pixels, and this one has "
            f"{len(ours.depths)} and {ours.patch}: export it to .onnx or .pt2"
        )
    timm = _library("timm")
    shapes = (ours.depths, ours.widths)
    known = (size for size in _TIMM_NAMES if (convnext.PRESETS[size].depths, convnext.PRESETS[size].widths) == shapes)
    architecture = _TIMM_NAMES[next(known, "t")]
    arguments = {"depths": list(ours.depths), "dims": list(ours.widths)}
    expansions = any(isinstance(module, Expansion) for module in model.modules())
    images = torch.randn(1, ours.channels, 64, 64, generator=torch.Generator().manual_seed(0))
    images = images.to(next(model.parameters()).dtype)
    theirs = timm.create_model(
        architecture, num_classes=ours.classes, in_chans=ours.channels, drop_path_rate=ours.drop_path, **arguments
    )
    _fill(theirs, model, names_in(TIMM, model.state_dict()))
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": ours.classes,
        "num_features": ours.widths[-1],
        "model_args": {**arguments, "in_chans": ours.channels},
        "pretrained_cfg": {
            "num_classes": ours.classes,
            "input_size": [ours.channels, image_size, image_size],
            "pool_size": None,
            "first_conv": "stem.0",
            "classifier": "head.fc",
        },
    }
    if expansions:
        config["ortho_fx"] = expansion_config(theirs)
        advice: tuple[str, ...] = (
            f'load it: model = timm.create_model("local-dir:{out}")',
            f'         ortho_fx.rewrite_like_(model, "{out}")',
            f'         model.load_state_dict(safetensors.torch.load_file("{out}/model.safetensors"))',
        )
    else:
        advice = (f'load it: timm.create_model("local-dir:{out}", pretrained=True)',)
    with _new_folder(Path(out)) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
        library = safetensors_library()
        library.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
        try:
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=not expansions)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise OrthoFxError(
                f"timm {timm.__version__} cannot load what was written: {reason(error)}; pip install -U timm"
            ) from None
        if expansions:
            rewrite_like_(loaded, folder)
            loaded.load_state_dict(library.torch.load_file(folder / "model.safetensors"))
        loaded.eval().to(images.dtype)
        difference = _difference(model, images, lambda: loaded(images), "timm")
        size = _size(folder)
    inputs = (f"images (batch, {ours.channels}, height, width)",)
    return FolderExport(Path(out), size, inputs, *difference, f"timm {timm.__version__}", advice)


def _fill(theirs: nn.Module, ours: nn.Module, names: Mapping[str, str]) -> None:
    """Gives a model of another library the expansions and the values of ours, whose names become `names`."""
    described = expansion_config(ours)
    if described["sites"]:
        owners = {name.rpartition(".")[0]: other.rpartition(".")[0] for name, other in names.items()}
        sites = {owners[name]: site for name, site in described["sites"].items()}
        shared = {owners[name]: owners[first] for name, first in described.get("shared", {}).items()}
        rewrite_like_(theirs, {**described, "sites": sites, "shared": shared})
    state = {}
    for name, tensor in ours.state_dict().items():
        if name in names:
            state[names[name]] = tensor.t() if ".c_" in names[name] and tensor.dim() == 2 else tensor
    theirs.to(next(ours.parameters()).dtype)
    missing, surplus = theirs.load_state_dict(state, strict=False)
    # A tied head, which stands in the state under one name.
    assert not surplus, surplus
    assert set(missing) <= {"lm_head.weight"}, missing


def _write_tokenizer(transformers: Any, vocabulary: Vocabulary, context: int, folder: Path) -> None:
    import tokenizers

    if vocabulary.file is not None:
        tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary.file))
    else:
        assert isinstance(vocabulary, Bytes)
        tokenizer = _byte_tokenizer(tokenizers)
    end = None if vocabulary.end is None else tokenizer.id_to_token(vocabulary.end)
    ends = {} if end is None else {"eos_token": end, "bos_token": end}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **ends)
    fast.save_pretrained(folder)
    # Releases 4 and 5 know this name of the class; 5 writes its own, which 4 does not know.
    settings = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _byte_tokenizer(tokenizers: Any) -> Any:
    """A tokenizer whose ids are the bytes of a text.

    A byte-level BPE has a letter for each byte: printable bytes stand for themselves, and the others for the letters
    from 256 on, in their order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: 256 + place for place, byte in enumerate(others)}
    ids = {chr(letters.get(byte, byte)): byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _difference(model: nn.Module, inputs: Tensor, theirs: Callable[[], Tensor], library: str) -> tuple[float, float]:
    """The largest difference between the logits, and the same relative to the largest logit."""
    with torch.no_grad(), evaluating(model):
        expected, found = model(inputs), theirs()
    difference = (found - expected).abs().max().item()
    relative = difference / (expected.abs().max().item() or 1.0)
    if not relative <= _TOLERANCE:
        raise OrthoFxError(
            f"the logits in {library} differ by {relative:.2g} of the largest, more than {_TOLERANCE:g}: "
            "nothing was written; please report it with the versions of both"
        )
    return difference, relative


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if the block succeeds."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OrthoFxError(f"{out} exists already: name a new folder, or an empty one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
            folder = Path(beside, out.name)
            folder.mkdir()
            yield folder
            mode = folder.stat().st_mode & 0o666
            for file in folder.iterdir():
                file.chmod(mode)  # safetensors makes files that only their owner can read
            if out.exists():
                out.rmdir()
            shutil.move(folder, out)
    except OSError as error:
        raise OrthoFxError(f"cannot write {out}: {reason(error)}") from None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars, and without the logger's remarks on models that are fine."""
    logging = transformers.logging
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OrthoFxError(f"a folder for {name} is checked by {name}: pip install {name}; {reason(error)}") from None
