"""Makes tests/ortho_fx/activations/torchortho_states.json: states of torchortho 0.1.2, for a test without it.

    pip install torchortho==0.1.2
    python benchmarks/torchortho_states.py

For each of its activations, at several degrees, the file has the state dict after noise of N(0, 0.3^2) on every
parameter, and the results at inputs from -4 to 4. Activations are only constructed and called; a state is keys and
numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torchortho

FIXTURE = Path(__file__).parents[1] / "tests" / "ortho_fx" / "activations" / "torchortho_states.json"
CASES = [
    ("HermiteActivation", "hermite", (1, 3, 8), {}),
    ("HermiteActivation", "hermite", (3,), {"use_numba": True}),
    ("HermiteActivation", "hermite", (3,), {"clamp": True}),
    ("FourierActivation", "fourier", (1, 5, 12), {}),
    ("TropicalActivation", "tropical", (1, 5), {}),
    ("TropicalRationalActivation", "tropical_rational", (1, 6), {}),
]


def record(title: str, basis: str, degree: int, settings: dict[str, bool], x: torch.Tensor) -> dict:
    activation = getattr(torchortho, title)(degree, **settings)
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        y = activation(x)
    state = {key: value.tolist() for key, value in activation.state_dict().items()}
    return {"title": title, "basis": basis, "degree": degree, "settings": settings, "state": state, "y": y.tolist()}


def main() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-4, 4, 25)
    rows = [
        record(title, basis, degree, settings, x) for title, basis, degrees, settings in CASES for degree in degrees
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    FIXTURE.write_text(f'{{"x": {json.dumps(x.tolist())}, "activations": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
