"""Loads weights of other libraries, and ours: GPT-2 of transformers, and ConvNeXt of timm and of its authors.

A layout is recognised by its names. Each has a table from its names to ours, in which N and M stand for numbers; the
config of the model follows from the shapes. A name that is not in the table is an error, so that no weight is lost
silently. Our models compute the same as the originals: GPT-2 with tanh-GELU and an epsilon of 1e-5 in its norms,
ConvNeXt with exact GELU, an epsilon of 1e-6, and a head that pools, normalises and classifies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx.config import ExpansionConfig, SiteConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.models import gpt2
from ortho_fx.models.convnext import ConvNeXtConfig
from ortho_fx.models.gpt2 import GPT2Config
from ortho_fx.models.weights.bundle import ModelConfig, Weights, described, shortened
from ortho_fx.rewriting.sources import config_of_tensors
from ortho_fx.tensor_files import TensorFile, errors_naming, files_of, read_json, read_tensors


@dataclass(frozen=True)
class Pretrained:
    """A loaded model and its kind ("gpt2" or "convnext"); `notes` say how it differs from the file."""

    kind: str
    model: nn.Module
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Layout:
    """The names of one library.

    `known_by` is a name that only this layout has. `names` maps its names to ours; None means that they are ours.
    `left_out` are names of tensors to ignore.
    """

    title: str
    kind: str
    known_by: str
    names: Mapping[str, str] | None = None
    prefix: str = ""
    left_out: tuple[str, ...] = ()


TRANSFORMERS = _Layout(
    "transformers' GPT-2",
    "gpt2",
    "h.N.attn.c_attn.weight",
    {
        "wte": "tokens",
        "wpe": "positions",
        "h.N.ln_1": "blocks.N.norm1",
        "h.N.attn.c_attn": "blocks.N.attention.qkv",
        "h.N.attn.c_proj": "blocks.N.attention.projection",
        "h.N.ln_2": "blocks.N.norm2",
        "h.N.mlp.c_fc": "blocks.N.mlp.expand",
        "h.N.mlp.c_proj": "blocks.N.mlp.projection",
        "ln_f": "norm",
        "lm_head": "head",
    },
    prefix="transformer.",
    left_out=("h.N.attn.bias", "h.N.attn.masked_bias"),  # the causal mask
)
TIMM = _Layout(
    "timm's ConvNeXt",
    "convnext",
    "stages.N.blocks.N.conv_dw.weight",
    {
        "stem.0": "stages.0.0",
        "stem.1": "stages.0.1",
        "stages.N.downsample.0": "stages.N.0",
        "stages.N.downsample.1": "stages.N.1",
        "stages.N.blocks.M.conv_dw": "stages.N.M.depthwise",
        "stages.N.blocks.M.norm": "stages.N.M.norm",
        "stages.N.blocks.M.mlp.fc1": "stages.N.M.expand",
        "stages.N.blocks.M.mlp.fc2": "stages.N.M.project",
        "stages.N.blocks.M.gamma": "stages.N.M.scale",
        "head.norm": "norm",
        "head.fc": "head",
    },
)
_LAYOUTS = (
    _Layout("ortho-fx' gpt2", "gpt2", "blocks.N.attention.qkv.weight"),
    _Layout("ortho-fx' convnext", "convnext", "stages.N.N.depthwise.weight"),
    TRANSFORMERS,
    TIMM,
    _Layout(
        "the ConvNeXt of its authors",
        "convnext",
        "stages.N.N.dwconv.weight",
        {
            "downsample_layers.N.0": "stages.N.0",
            "downsample_layers.N.1": "stages.N.1",
            "stages.N.M.dwconv": "stages.N.M.depthwise",
            "stages.N.M.norm": "stages.N.M.norm",
            "stages.N.M.pwconv1": "stages.N.M.expand",
            "stages.N.M.pwconv2": "stages.N.M.project",
            "stages.N.M.gamma": "stages.N.M.scale",
            "norm": "norm",
            "head": "head",
        },
    ),
)
# Each of our stages begins with two entry layers; its blocks follow them.
_ENTRY = 2
_HALF = (torch.float16, torch.bfloat16)
# Values in config.json with which our GPT-2 computes the same as transformers'. A missing key means the first value.
_GPT2_FACTS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def load_pretrained(
    path: str | Path,
    *,
    kind: str | None = None,
    classes: int | None = None,
    channels: int | None = None,
    context: int | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
) -> Pretrained:
    """The model in a file or folder, on the CPU, in train mode and in float32, or in float64 if its weights are.

    Models of other libraries have their GELU; those that `save_weights` wrote have their expansions.

    Args:
        path: a run's directory; a file of `save_weights`; a folder of transformers (config.json beside
            model.safetensors or pytorch_model.bin, either of them whole or in parts with an index); or a .safetensors,
            .bin, .pth or .pt file with a state dict of our models, of transformers' GPT-2 or of a ConvNeXt, at the top
            or under "model" or "state_dict".
        kind: "gpt2" or "convnext", the kind that the model must have; None for either.
        classes: number of classes that a ConvNeXt must have; if it has another number, its head is initialised anew.
        channels: number of channels that a ConvNeXt must take; another number is an error.
        context: number of tokens that a GPT-2 must take at once; further positions are dropped, fewer are an error.
        dropout, drop_path: for training, if the model has it (None: as in the file, or 0).

    Raises:
        OrthoFxError: a file that cannot be read, names of no known layout, tensors that fit none of our models, a
            config.json of a model that ours cannot compute, or settings that the model cannot meet.
    """
    path = Path(path)
    read = [read_tensors(file) for file in files_of(path)]
    with errors_naming(path):
        weights, notes = _weights(path, read)
        if kind not in (None, weights.kind):
            raise OrthoFxError(f"it is a {weights.kind}, and has to be a {kind}")
        weights, adapted = _adapted(weights, classes, channels, context)
        weights = replace(weights, config=_regularised(weights.config, dropout, drop_path))
        return Pretrained(weights.kind, weights.build(), (*notes, *adapted))


def convert(state: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> Weights:
    """Converts a state dict of any known layout to ours.

    Args:
        state: the tensors by name, those of a rewritten model with the parameters of its expansions.
        settings: the config.json of transformers' GPT-2, which alone states the number of heads. Without it, the number
            is that of the preset with this number of layers and width, else width / 64.

    Raises:
        OrthoFxError: names of no known layout, names that the layout does not have, a head that is not tied, shapes
            that no config has, or settings of a model that ours cannot compute.
    """
    layout, state = _recognised(state)
    if layout.names is not None:
        state = _renamed(layout, state)
    tensors = dict(state)
    if layout.kind == "convnext":
        return Weights("convnext", _convnext_config(tensors), expansions_of(tensors), tensors)
    head = tensors.pop("head.weight", None)
    if head is not None and not torch.equal(head, _of_rank(tensors, "tokens.weight", 2)):
        raise OrthoFxError("the head is not tied: it differs from the embedding of the tokens, which GPT-2 has for it")
    return Weights("gpt2", _gpt2_config(tensors, settings), expansions_of(tensors), tensors)


def expansions_of(state: Mapping[str, Tensor]) -> dict[str, SiteConfig]:
    """The expansions in a state dict of ours, by site, inferred from names and shapes.

    Their initialisation cannot be inferred: init is "stable", and clamp is half the distance between the bounds.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        site, _, parameter = name.rpartition(".")
        found.setdefault(site, {})[parameter] = tensor
    expansions = {}
    for site, parameters in found.items():
        config = config_of_tensors(parameters)
        # In both models the layer before an activation is its sibling `expand`, whose width is the number of channels.
        before = state.get(f"{site.rpartition('.')[0]}.expand.weight")
        if config is not None and before is not None:
            expansions[site] = _one_a_group(config, before.shape[0])
    return expansions


def _one_a_group(config: ExpansionConfig, channels: int) -> SiteConfig:
    if config.granularity == "layer":
        return SiteConfig(config)
    granularity = "channel" if config.granularity == f"group:{channels}" else config.granularity
    return SiteConfig(replace(config, granularity=granularity), channels, -1)


# What the other libraries call the places of our activations; M counts blocks.
_ACTIVATIONS = {"blocks.N.mlp.act": "h.N.mlp.act", "stages.N.M.gelu_expansion_0": "stages.N.blocks.M.mlp.act"}


def names_in(layout: _Layout, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names that a layout has for the tensors of our model, expansions too; a tied head is left out.

    Raises:
        OrthoFxError: tensors that the layout has no name for.
    """
    assert layout.names is not None
    pairs = [*((ours, theirs) for theirs, ours in layout.names.items() if theirs != "lm_head"), *_ACTIVATIONS.items()]
    rules = [(_pattern(ours, r"(\.\w+|)"), theirs) for ours, theirs in pairs]
    found = {}
    for name in state:
        if layout.kind == "gpt2" and name == "head.weight":
            continue
        matches = ((pattern.fullmatch(name), theirs) for pattern, theirs in rules)
        match, theirs = next(((match, theirs) for match, theirs in matches if match), (None, ""))
        if match is None:
            raise OrthoFxError(f"{layout.title} has no place for {name}")
        *numbers, suffix = match.groups()
        for placeholder, number in zip("NM", numbers, strict=False):
            theirs = theirs.replace(placeholder, str(int(number) - (_ENTRY if placeholder == "M" else 0)))
        found[name] = f"{layout.prefix}{theirs}{suffix}"
    return found


def _recognised(state: Mapping[str, Tensor]) -> tuple[_Layout, Mapping[str, Tensor]]:
    """The layout to which these names belong, and the tensors without its prefix."""
    for layout in _LAYOUTS:
        plain = {name.removeprefix(layout.prefix): tensor for name, tensor in state.items()}
        if any(_pattern(layout.known_by).fullmatch(name) for name in plain):
            return layout, plain
    titles = ", ".join(layout.title for layout in _LAYOUTS)
    raise OrthoFxError(f"names of no known layout ({shortened(state) or 'none'}); known are {titles}")


def _pattern(names: str, suffix: str = "") -> re.Pattern[str]:
    return re.compile(re.escape(names).replace("N", r"(\d+)").replace("M", r"(\d+)") + suffix)


def _renamed(layout: _Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert layout.names is not None
    rules = [(_pattern(theirs, r"(\.weight|\.bias|)"), ours) for theirs, ours in layout.names.items()]
    left_out = [_pattern(names) for names in layout.left_out]
    renamed, unknown = {}, []
    for name, tensor in state.items():
        if any(pattern.fullmatch(name) for pattern in left_out):
            continue
        matches = ((pattern.fullmatch(name), ours) for pattern, ours in rules)
        match, ours = next(((match, ours) for match, ours in matches if match), (None, ""))
        if match is None:
            unknown.append(name)
            continue
        *numbers, suffix = match.groups()
        for placeholder, number in zip("NM", numbers, strict=False):
            ours = ours.replace(placeholder, str(int(number) + (_ENTRY if placeholder == "M" else 0)))
        renamed[ours + suffix] = _reshaped(layout, name, tensor)
    if unknown:
        raise OrthoFxError(f"not in {layout.title}: {shortened(unknown)}; variants of it are not supported")
    return renamed


def _reshaped(layout: _Layout, name: str, tensor: Tensor) -> Tensor:
    if layout.kind == "gpt2" and ".c_" in name and tensor.dim() == 2:
        return tensor.t().contiguous()  # transformers stores (in, out)
    if ".mlp." in name and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)  # timm's small variants have 1 x 1 convolutions for linear layers
    return tensor


def _convnext_config(state: Mapping[str, Tensor]) -> ConvNeXtConfig:
    block = _pattern("stages.N.N.depthwise.weight")
    stages = [int(match[1]) for match in map(block.fullmatch, state) if match]
    depths = tuple(stages.count(stage) for stage in sorted(set(stages)))
    width, channels, patch, _ = _of_rank(state, "stages.0.0.weight", 4).shape
    later = [_of_rank(state, f"stages.{stage}.1.weight", 4).shape[0] for stage in range(1, len(depths))]
    classes = _of_rank(state, "head.weight", 2).shape[0]
    return ConvNeXtConfig(channels, classes, patch, depths, (width, *later))


def _gpt2_config(state: Mapping[str, Tensor], settings: Mapping[str, Any] | None) -> GPT2Config:
    vocabulary, width = _of_rank(state, "tokens.weight", 2).shape
    context = _of_rank(state, "positions.weight", 2).shape[0]
    layers = len({match[1] for match in map(re.compile(r"blocks\.(\d+)\..*").fullmatch, state) if match})
    heads = _heads(layers, width)[0] if settings is None else _stated_heads(settings, width)
    return GPT2Config(vocabulary, context, layers, heads, width, gated="blocks.0.mlp.gate.weight" in state)


def _stated_heads(settings: Mapping[str, Any], width: int) -> int:
    for name, allowed in _GPT2_FACTS.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise OrthoFxError(f"config.json has {name} {settings[name]!r}, and ortho-fx' GPT-2 has {allowed[0]!r}")
    heads = settings.get("n_head", 12)  # the default of transformers
    if settings.get("n_embd", width) != width or not isinstance(heads, int) or heads < 1 or width % heads:
        raise OrthoFxError(
            f"config.json has n_embd {settings.get('n_embd')!r} and n_head {heads!r}, which do not fit the tensors' "
            f"width {width}"
        )
    return heads


def _heads(layers: int, width: int) -> tuple[int, str]:
    """A guess of the number of heads of a GPT-2 whose file does not state it, and the reason for the guess."""
    for size, preset in gpt2.PRESETS.items():
        if (preset.layers, preset.width) == (layers, width):
            return preset.heads, f"as in {size}"
    if width % 64:
        raise OrthoFxError(
            f"the tensors do not tell the number of heads, and width {width} is no multiple of 64: put transformers' "
            "config.json beside them"
        )
    return width // 64, "width / 64"


def _of_rank(state: Mapping[str, Tensor], name: str, rank: int) -> Tensor:
    """The tensor of that name; an error unless it exists and has `rank` dimensions."""
    if name not in state or state[name].dim() != rank:
        came = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
        raise OrthoFxError(f"what becomes {name}, of {rank} dimensions, is {came}")
    return state[name]


def _adapted(
    weights: Weights, classes: int | None, channels: int | None, context: int | None
) -> tuple[Weights, tuple[str, ...]]:
    """The weights adapted to other data, and notes on the changes."""
    config, state = weights.config, dict(weights.state)
    asked = {"convnext": {"classes": classes, "channels": channels}, "gpt2": {"context": context}}
    for kind, settings in asked.items():
        for name, value in settings.items():
            if value is not None and kind != weights.kind:
                raise OrthoFxError(f"{name} is a setting of {kind}, and this is a {weights.kind}")
            if value is not None and value < 1:
                raise OrthoFxError(f"{name} must be 1 or more; got {value}")
    if isinstance(config, GPT2Config):
        if context is None or context == config.context:
            return weights, ()
        if context > config.context:
            raise OrthoFxError(f"it knows {config.context} positions, and cannot take a context of {context} tokens")
        state["positions.weight"] = state["positions.weight"][:context].clone()
        note = f"it keeps the first {context} of its {config.context} positions"
        return replace(weights, config=replace(config, context=context), state=state), (note,)
    if channels not in (None, config.channels):
        raise OrthoFxError(f"it takes images of {config.channels} channels; the data have {channels}")
    if classes is None or classes == config.classes:
        return weights, ()
    fresh = state["head.weight"].new_empty(classes, config.widths[-1])
    state |= {"head.weight": nn.init.trunc_normal_(fresh, std=0.02), "head.bias": fresh.new_zeros(classes)}
    note = f"its head of {config.classes} classes is replaced by a fresh one of {classes}"
    return replace(weights, config=replace(config, classes=classes), state=state), (note,)


def _regularised(config: ModelConfig, dropout: float | None, drop_path: float | None) -> ModelConfig:
    if isinstance(config, GPT2Config):
        return config if dropout is None else replace(config, dropout=dropout)
    return config if drop_path is None else replace(config, drop_path=drop_path)


def _weights(path: Path, read: Sequence[TensorFile]) -> tuple[Weights, tuple[str, ...]]:
    """The weights in the files of a path, in float32 or float64, and notes on guesses and conversions."""
    notes = []
    tensors = {name: tensor for file in read for name, tensor in file.tensors.items()}
    own = next((file.metadata for file in read if "ortho_fx" in file.metadata), None)
    if own is not None:
        weights = described(tensors, own)
    else:
        settings = _settings(path)
        weights = convert(tensors, settings)
        config = weights.config
        if isinstance(config, GPT2Config) and settings is None:
            source = _heads(config.layers, config.width)[1]
            notes.append(f"the file does not tell its number of heads, which is taken to be {config.heads}, {source}")
    half = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.state.values() if tensor.dtype in _HALF}
    if half:
        notes.append(f"its weights in {' and '.join(sorted(half))} are now in float32")
        state = {name: t.float() if t.dtype in _HALF else t for name, t in weights.state.items()}
        weights = replace(weights, state=state)
    return weights, tuple(notes)


def _settings(path: Path) -> dict[str, Any] | None:
    """The config.json of a GPT-2 in a folder or beside a file; None if it is missing or of another model."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    settings = read_json(file) if file.is_file() else {}
    return settings if settings.get("model_type") == "gpt2" else None
