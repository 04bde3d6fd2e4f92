"""A GPT-2 trained with GELU goes on with fits of GELU: what the exchange costs, and what fine-tuning makes of it.

    python benchmarks/fine_tuning.py [--steps 1500] [--fine-tune 300] [--seeds 3]

The tiny GPT-2 trains on the source of Python's standard library with GELU. Then its activations are replaced by fits
under their real inputs. Both the rewritten and the untouched model are fine-tuned, on the same batches at the same
learning rate. The fits learn at ten times that rate, and the norm of their gradient is clipped separately. Writes
results/fine_tuning.json and prints a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, param_groups, rewrite_
from ortho_fx.models.data.loader import load_validation
from ortho_fx.models.data.text import StandardLibrary
from ortho_fx.models.gpt2 import PRESETS
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.training.loop import train
from ortho_fx.models.training.optimization import learning_rate_scale
from ortho_fx.models.weights.bundle import load_model

RESULT = Path(__file__).parent / "results" / "fine_tuning.json"
CONFIGS = {
    "gelu": None,
    "hermite 8": ExpansionConfig("hermite", 8, "fit"),
    "fourier 6": ExpansionConfig("fourier", 6, "fit"),
    "tropical_rational 6": ExpansionConfig("tropical_rational", 6, "fit"),
}
BATCH, LEARNING_RATE, VALIDATION_WINDOWS = 16, 1e-3, 960
# A fit starts at the model's old activation. At the learning rate of the weights it would hardly move in so few steps.
EXPANSION_LEARNING_RATE = 10 * LEARNING_RATE


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def validate(compiled, model: nn.Module, data: StandardLibrary) -> float:
    model.eval()
    with torch.no_grad():
        values = [compiled(model, *batch).item() for batch in load_validation(data, size=BATCH)]
    model.train()
    return statistics.fmean(values)


def fine_tune(model: nn.Module, config: ExpansionConfig | None, data: StandardLibrary, seed: int, steps: int) -> dict:
    """Fine-tunes the model on batches that its training did not see; the validation loss before and after."""
    fits = {}
    if config is not None:
        batch, _ = data.batch(seed, 10**6, BATCH)
        fits = {site.name: site.fit_rmse for site in rewrite_(model, config, example_inputs=batch).replaced}
    compiled = torch.compile(loss)
    before = validate(compiled, model, data)
    groups = param_groups(model, lr=LEARNING_RATE, weight_decay=0.1, expansion_lr=EXPANSION_LEARNING_RATE)
    rates = [group["lr"] for group in groups]
    # The coefficient of He_8 / 8! has a gradient in the hundreds at an outlier. Clipped together, it would scale down
    # the gradients of the weights.
    weights, expansions = (
        [parameter for group in groups if (group["name"] == "expansions") == own for parameter in group["params"]]
        for own in (False, True)
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate_scale(step, steps, 20)
        value = compiled(model, *data.batch(seed, 10**6 + 1 + step, BATCH))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        nn.utils.clip_grad_norm_(expansions, 1.0)
        optimizer.step()
    return {"before": before, "after": validate(compiled, model, data), "fit_rmse": fits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--fine-tune", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    data = StandardLibrary(PRESETS["tiny"].context, VALIDATION_WINDOWS)
    runs: list[dict] = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as out:
            config = TrainConfig(basis="none", steps=arguments.steps, seed=seed, eval_every=500, out=out)
            train(config)
            trained = load_model(Path(out) / "model.safetensors")
        for name, expansion in CONFIGS.items():
            torch.compiler.reset()
            row = {"activation": name, "seed": seed}
            row |= fine_tune(copy.deepcopy(trained), expansion, data, seed, arguments.fine_tune)
            runs.append(row)
            print(f"seed {seed}  {name:20} before {row['before']:.4f}  after {row['after']:.4f}", flush=True)
    result = {
        "date": date.today().isoformat(),
        "hardware": f"{torch.get_num_threads()} threads of a {platform.machine()} CPU",
        "torch": torch.__version__,
        "learning_rate": LEARNING_RATE,
        "expansion_learning_rate": EXPANSION_LEARNING_RATE,
        **vars(arguments),
        "runs": runs,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name in CONFIGS:
        rows = [[row for row in runs if row["activation"] == key] for key in ("gelu", name)]
        for moment in ("before", "after"):
            gaps = [row[moment] - gelu[moment] for gelu, row in zip(*rows, strict=True)]
            print(f"{name:20} {moment:6} {statistics.fmean(gaps):+.4f} nats beside gelu, seeds {gaps}")


if __name__ == "__main__":
    main()
