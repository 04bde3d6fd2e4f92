"""ConvNeXt as published, in plain PyTorch. It knows nothing of expansions; the rewrite inserts them.

Liu et al., "A ConvNet for the 2020s", CVPR 2022: a patchifying stem, four stages of depthwise 7 x 7 blocks with an
inverted bottleneck on channels-last, layer scale, stochastic depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvNeXtConfig:
    channels: int = 3
    classes: int = 1000
    patch: int = 4
    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    drop_path: float = 0.0
    layer_scale: float = 1e-6
    # Blocks with SwiGLU of as many parameters: three matrices of 8/3 the width instead of two of 4 times the width.
    gated: bool = False


# "tiny" is for digits of 8 x 8 pixels, "small" for the 28 x 28 pixels of the MNIST family. "tiny" has no patches of one
# pixel: of such a patch the stem's normalisation would keep only the sign. Both have a layer scale of 1: with so few
# layers, 1e-6 would leave the blocks unused.
PRESETS: dict[str, ConvNeXtConfig] = {
    "tiny": ConvNeXtConfig(channels=1, classes=10, patch=2, depths=(2, 2), widths=(48, 96), layer_scale=1.0),
    "small": ConvNeXtConfig(channels=1, classes=10, depths=(2, 6), widths=(64, 128), layer_scale=1.0),
    "t": ConvNeXtConfig(),
    "s": ConvNeXtConfig(depths=(3, 3, 27, 3)),
    "b": ConvNeXtConfig(depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)),
    "l": ConvNeXtConfig(depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536)),
}


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (batch, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, width: int, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), layer_scale))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))  # (batch, height, width, channels)
        return self.added(x, self.project(F.gelu(self.expand(y))))

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x plus the scaled result y of the bottleneck, or x alone for the images whose path is dropped."""
        y = (y * self.scale).permute(0, 3, 1, 2)
        if self.training and self.drop_path > 0:
            kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop_path
            y = y * kept.to(y.dtype) / (1 - self.drop_path)
        return x + y


class GatedBlock(Block):
    def __init__(self, width: int, drop_path: float, layer_scale: float) -> None:
        super().__init__(width, drop_path, layer_scale)
        hidden = 8 * width // 3
        self.gate = nn.Linear(width, hidden)
        self.expand = nn.Linear(width, hidden)
        self.project = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return self.added(x, self.project(F.silu(self.gate(y)) * self.expand(y)))


class ConvNeXt(nn.Module):
    """Logits (batch, classes) for images (batch, channels, height, width)."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        widths, total = config.widths, sum(config.depths)
        self.stages = nn.ModuleList()
        for stage, (depth, width) in enumerate(zip(config.depths, widths, strict=True)):
            if stage == 0:
                entry = [
                    nn.Conv2d(config.channels, width, kernel_size=config.patch, stride=config.patch),
                    ChannelNorm(width, eps=1e-6),
                ]
            else:
                before = widths[stage - 1]
                entry = [ChannelNorm(before, eps=1e-6), nn.Conv2d(before, width, kernel_size=2, stride=2)]
            first = sum(config.depths[:stage])
            rates = [config.drop_path * (first + i) / max(total - 1, 1) for i in range(depth)]
            block = GatedBlock if config.gated else Block
            blocks = [block(width, rate, config.layer_scale) for rate in rates]
            self.stages.append(nn.Sequential(*entry, *blocks))
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x.mean(dim=(2, 3))))
