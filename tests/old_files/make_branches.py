"""Writes branches.pt with an ortho_fx whose calls in two branches had an expansion each: `python make_branches.py`."""

from pathlib import Path

import torch
from old_models import Branches

import ortho_fx

torch.manual_seed(0)
model, x = Branches().eval(), torch.randn(4, 6)
ortho_fx.rewrite_(model, ortho_fx.ExpansionConfig("hermite", 3))
torch.nn.init.normal_(model.silu_expansion_1.coefficients)
outputs = {step: model(x, step).detach() for step in (True, False)}
torch.save((model, x, outputs), Path(__file__).parent / "branches.pt")
