"""Models that the files beside this one hold; the pickles name their classes."""

import torch.nn.functional as F
from torch import nn


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = F.gelu(self.a(x))
        return self.b(x.relu())


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.activation = nn.Linear(6, 8), F.silu

    def forward(self, x):
        return self.activation(self.a(x))


def sequential():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)

    def forward(self, x, step=False):
        if step:
            return F.silu(self.a(x))
        return F.silu(self.a(x))
