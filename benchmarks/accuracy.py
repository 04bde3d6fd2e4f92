"""Rounding errors of expansions in float32, bfloat16 and float16, compared with float64, on [-10, 10].

    python benchmarks/accuracy.py

Expansions of each basis and degree are initialised for inputs of N(0, 1), N(0, 0.2^2) and N(0, 3^2). Measured are the
largest error of value and input gradient, in units of max(1, |exact|), and the error at x = 10. The inputs are numbers
of the tested dtype; parameters are float32, and the exact result is computed from them in float64. Writes
results/accuracy.json and prints a table.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import torch

from ortho_fx import ExpansionConfig
from ortho_fx.activations.expansion import make_activation
from ortho_fx.numerics.initialisation import initial_parameters

RESULT = Path(__file__).parent / "results" / "accuracy.json"
NETWORKS = [
    *(("hermite", degree) for degree in (3, 8, 16, 32)),
    *(("fourier", degree) for degree in (5, 16, 64)),
    *(("tropical", degree) for degree in (5, 64)),
    *(("tropical_rational", degree) for degree in (6, 64)),
]
DEVIATIONS = (0.2, 1.0, 3.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def evaluate(activation, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    x = x.detach().requires_grad_()
    y = activation(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach().double().numpy(), slope.double().numpy()


def measure(basis: str, degree: int, std: float, dtype: torch.dtype) -> dict:
    config = ExpansionConfig(basis, degree)
    activation = make_activation(config)
    activation.set_parameters(activation.basis.rescale(initial_parameters(config), 0.0, std))
    exact = make_activation(config, dtype=torch.float64)
    exact.load_state_dict(activation.state_dict())
    x = torch.linspace(-10, 10, 100_001, dtype=torch.float64).to(dtype)
    row = {"basis": basis, "degree": degree, "std": std, "dtype": str(dtype).removeprefix("torch.")}
    pairs = zip(("value", "gradient"), evaluate(activation, x), evaluate(exact, x.double()), strict=True)
    for name, rounded, reference in pairs:
        error = np.abs(rounded - reference) / np.maximum(1, np.abs(reference))
        row[f"{name}_error"] = float(error.max())
        row[f"{name}_error_at_10"] = float(error[-1])
        row[f"{name}_at_10"] = float(reference[-1])
    return row


def main() -> None:
    rows = [measure(*network, std, dtype) for network in NETWORKS for std in DEVIATIONS for dtype in DTYPES]
    for row in rows:
        print(
            f"{row['basis']:17} {row['degree']:2} std {row['std']:3} {row['dtype']:8} "
            f"value {row['value_error']:.1e} (at 10: {row['value_error_at_10']:.1e}, y = {row['value_at_10']:.2g})  "
            f"gradient {row['gradient_error']:.1e}"
        )
    result = {"date": date.today().isoformat(), "torch": torch.__version__, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
