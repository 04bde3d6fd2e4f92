"""State dicts and logits of other libraries' models, for tests without these libraries.

The reference logits are functions of the state dict alone, in float64, with the formulas of the papers; matrix products
use the layout's own orientation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

WIDTH, LAYERS, VOCABULARY, CONTEXT = 12, 2, 11, 8
DEPTHS, WIDTHS, CLASSES, CHANNELS, PATCH = (1, 2), (6, 10), 5, 3, 2


def randoms(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for name, shape in shapes.items()}


def transformers_state(prefix="transformer.", width=WIDTH):
    """A state dict of GPT2LMHeadModel: linear maps (in, out), the causal mask in buffers, the tied head with a name."""
    shapes = {"wte.weight": (VOCABULARY, width), "wpe.weight": (CONTEXT, width)}
    for i in range(LAYERS):
        sizes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        sizes |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
        for name, size in sizes.items():
            shapes |= {f"h.{i}.{name}.weight": size, f"h.{i}.{name}.bias": size[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (width,), f"h.{i}.{name}.bias": (width,)}
    state = randoms({**shapes, "ln_f.weight": (width,), "ln_f.bias": (width,)})
    for i in range(LAYERS):
        state[f"h.{i}.attn.bias"] = torch.ones(CONTEXT, CONTEXT).tril().bool()[None, None]
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return {**{prefix + name: tensor for name, tensor in state.items()}, "lm_head.weight": state["wte.weight"]}


def transformers_logits(state, tokens, heads):
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}

    def linear(name, x):
        return x @ state[f"{name}.weight"] + state[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x):
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    time = tokens.shape[1]
    x = state["wte.weight"][tokens] + state["wpe.weight"][:time]
    for i in range(LAYERS):
        q, k, v = linear(f"h.{i}.attn.c_attn", norm(f"h.{i}.ln_1", x)).chunk(3, dim=-1)
        outputs = []
        for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            scores = qh @ kh.transpose(1, 2) / math.sqrt(qh.shape[-1])
            scores = scores.masked_fill(~torch.ones(time, time).tril().bool(), -math.inf)
            outputs.append(scores.softmax(-1) @ vh)
        x = x + linear(f"h.{i}.attn.c_proj", torch.cat(outputs, -1))
        x = x + linear(f"h.{i}.mlp.c_proj", gelu(linear(f"h.{i}.mlp.c_fc", norm(f"h.{i}.ln_2", x))))
    return norm("ln_f", x) @ state["wte.weight"].t()


# The name of each part of a ConvNeXt in a layout; s and b are the numbers of stage and block.
TIMM = {
    "conv": lambda s: "stem.0" if s == 0 else f"stages.{s}.downsample.1",
    "entry norm": lambda s: "stem.1" if s == 0 else f"stages.{s}.downsample.0",
    "depthwise": lambda s, b: f"stages.{s}.blocks.{b}.conv_dw",
    "norm": lambda s, b: f"stages.{s}.blocks.{b}.norm",
    "expand": lambda s, b: f"stages.{s}.blocks.{b}.mlp.fc1",
    "project": lambda s, b: f"stages.{s}.blocks.{b}.mlp.fc2",
    "gamma": lambda s, b: f"stages.{s}.blocks.{b}.gamma",
    "last norm": lambda: "head.norm",
    "head": lambda: "head.fc",
}
AUTHORS = {
    "conv": lambda s: f"downsample_layers.{s}.{0 if s == 0 else 1}",
    "entry norm": lambda s: f"downsample_layers.{s}.{1 if s == 0 else 0}",
    "depthwise": lambda s, b: f"stages.{s}.{b}.dwconv",
    "norm": lambda s, b: f"stages.{s}.{b}.norm",
    "expand": lambda s, b: f"stages.{s}.{b}.pwconv1",
    "project": lambda s, b: f"stages.{s}.{b}.pwconv2",
    "gamma": lambda s, b: f"stages.{s}.{b}.gamma",
    "last norm": lambda: "norm",
    "head": lambda: "head",
}


def convnext_state(layout):
    shapes = {}

    def layer(name, *size):
        shapes.update({f"{name}.weight": size, f"{name}.bias": size[:1]})

    for s, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
        side, before = (PATCH, CHANNELS) if s == 0 else (2, WIDTHS[s - 1])
        layer(layout["conv"](s), width, before, side, side)
        layer(layout["entry norm"](s), width if s == 0 else before)
        for b in range(depth):
            layer(layout["depthwise"](s, b), width, 1, 7, 7)
            layer(layout["norm"](s, b), width)
            layer(layout["expand"](s, b), 4 * width, width)
            layer(layout["project"](s, b), width, 4 * width)
            shapes[layout["gamma"](s, b)] = (width,)
    layer(layout["last norm"](), WIDTHS[-1])
    layer(layout["head"](), CLASSES, WIDTHS[-1])
    return randoms(shapes)


def convnext_logits(layout, state, images):
    def pair(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(name, x):  # over the channels, which are dimension 1
        weight, bias = pair(name)
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return scaled * weight.reshape(shape) + bias.reshape(shape)

    def pointwise(name, x):  # over the channels, which are dimension 1
        weight, bias = pair(name)
        return torch.einsum("oi,nihw->nohw", weight.reshape(len(weight), -1), x) + bias.reshape(1, -1, 1, 1)

    x = images
    for s, depth in enumerate(DEPTHS):
        if s == 0:
            x = norm(layout["entry norm"](s), F.conv2d(x, *pair(layout["conv"](s)), stride=PATCH))
        else:
            x = F.conv2d(norm(layout["entry norm"](s), x), *pair(layout["conv"](s)), stride=2)
        for b in range(depth):
            weight, bias = pair(layout["depthwise"](s, b))
            y = norm(layout["norm"](s, b), F.conv2d(x, weight, bias, padding=3, groups=len(weight)))
            y = pointwise(layout["expand"](s, b), y)
            y = pointwise(layout["project"](s, b), y / 2 * (1 + torch.erf(y / math.sqrt(2))))
            x = x + y * state[layout["gamma"](s, b)].reshape(1, -1, 1, 1)
    weight, bias = pair(layout["head"]())
    return norm(layout["last norm"](), x.mean((2, 3))) @ weight.t() + bias
