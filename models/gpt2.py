"""GPT-2 as published, in plain PyTorch. It knows nothing of expansions; the rewrite inserts them.

Radford et al., "Language models are unsupervised multitask learners", 2019: learned positions, layer normalisation
before each block, tanh-GELU, a head tied to the token embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPT2Config:
    vocabulary: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.0
    # A SwiGLU MLP with as many parameters: three matrices of 8/3 the width instead of two of 4 times the width.
    gated: bool = False


PRESETS: dict[str, GPT2Config] = {
    "tiny": GPT2Config(vocabulary=256, context=128, layers=4, heads=4, width=128),
    "small": GPT2Config(vocabulary=256, context=128, layers=4, heads=5, width=160),
    "11m": GPT2Config(vocabulary=256, context=128, layers=6, heads=6, width=384),
    "124m": GPT2Config(),
    "350m": GPT2Config(layers=24, heads=16, width=1024),
    "774m": GPT2Config(layers=36, heads=20, width=1280),
    "1.5b": GPT2Config(layers=48, heads=25, width=1600),
}


class Attention(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.projection = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (batch, heads, time, ...)
        return self.projection(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.act = nn.GELU(approximate="tanh")
        self.projection = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.act(self.expand(x)))


class GatedMLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        hidden = 8 * config.width // 3
        self.gate = nn.Linear(config.width, hidden)
        self.expand = nn.Linear(config.width, hidden)
        self.act = nn.SiLU()
        self.projection = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.act(self.gate(x)) * self.expand(x))


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = GatedMLP(config) if config.gated else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT2(nn.Module):
    """Logits (batch, time, vocabulary) of the next token, for tokens (batch, time) of integers."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Each block adds two outputs to the residual stream. They start smaller, so that their sum stays small.
                residual = name.endswith("projection.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
