"""Weights of other libraries in our models: whether the logits agree, and how much fits of GELU change them.

    python benchmarks/pretrained_layouts.py

Builds GPT2LMHeadModel of transformers and ConvNeXts of timm with random weights, saves them as those libraries and
their users do, loads the files with `load_pretrained`, and compares logits in float64 and float32. Then `rewrite_`
replaces GELU by fits for its inputs on one batch. The change of the logits on another batch is measured in their
standard deviations. The weights are random, and trained activations have other inputs. Writes
results/pretrained_layouts.json and prints a table; fails if logits differ.
"""

from __future__ import annotations

import copy
import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, rewrite_
from ortho_fx.models.weights.layouts import load_pretrained

RESULT = Path(__file__).parent / "results" / "pretrained_layouts.json"
TOLERANCE = 1e-10  # of the largest logit, in float64
FITS = {
    "hermite 8": ExpansionConfig("hermite", 8, "fit"),
    "fourier 6": ExpansionConfig("fourier", 6, "fit"),
    "tropical_rational 6": ExpansionConfig("tropical_rational", 6, "fit"),
}
Save = Callable[[nn.Module, Path], Path]


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    save: Save
    inputs: Callable[[int], Tensor]
    saved_as: str


def folder(model: nn.Module, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def folder_in_parts(model: nn.Module, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="1MB")
    assert (path / "model.safetensors.index.json").exists()
    return path


def pickled(model: nn.Module, path: Path) -> Path:
    torch.save({"model": model.state_dict()}, path / "weights.pth")
    return path / "weights.pth"


def safetensors(model: nn.Module, path: Path) -> Path:
    save_file(model.state_dict(), path / "model.safetensors")
    return path / "model.safetensors"


def gpt2(name: str, save: Save, saved_as: str, tokens: int, **sizes: int) -> Case:
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)

    def inputs(seed: int) -> Tensor:
        return torch.randint(config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(seed))

    return Case(name, lambda: transformers.GPT2LMHeadModel(config), save, inputs, saved_as)


def convnext(name: str, save: Save, saved_as: str, side: int = 128) -> Case:
    def inputs(seed: int) -> Tensor:
        return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return Case(f"timm {name}", lambda: timm.create_model(name), save, inputs, saved_as)


SMALL = {"vocab_size": 512, "n_positions": 128, "n_layer": 4, "n_embd": 128}
CASES = (
    gpt2("transformers GPT-2, 4 layers of 128, 4 heads", folder, "folder", 64, **SMALL, n_head=4),
    gpt2("transformers GPT-2, 4 layers of 128, 2 heads", folder_in_parts, "folder, in parts", 64, **SMALL, n_head=2),
    gpt2("transformers GPT-2, 4 layers of 192, 3 heads", pickled, ".pth", 64, **{**SMALL, "n_embd": 192}, n_head=3),
    gpt2("transformers GPT-2, 124M", folder, "folder", 64),
    convnext("convnext_atto", safetensors, ".safetensors"),
    convnext("convnext_tiny", safetensors, ".safetensors"),
    convnext("convnext_small", pickled, ".pth"),
    convnext("convnext_base", pickled, ".pth"),
)


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Moves all parameters off their initial constants; a bias or layer scale near zero would hide confused names."""
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.1, 0.3)
        else:
            parameter.add_(0.02 * torch.randn_like(parameter))


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    outputs = model(inputs.to(dtype) if inputs.is_floating_point() else inputs)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def loaded(case: Case, model: nn.Module) -> tuple[nn.Module, list[str]]:
    with tempfile.TemporaryDirectory() as temporary:
        pretrained = load_pretrained(case.save(model, Path(temporary)))
    return pretrained.model.eval(), list(pretrained.notes)


def measure(case: Case) -> dict:
    torch.manual_seed(0)
    theirs = case.build().eval()
    perturb(theirs)
    ours, notes = loaded(case, theirs)
    batch, other = case.inputs(0), case.inputs(1)
    difference = (logits(ours, batch) - logits(theirs, batch)).abs().max().item()
    exact, _ = loaded(case, theirs.double())
    expected = logits(theirs, batch)
    relative = ((logits(exact, batch) - expected).abs().max() / expected.abs().max()).item()
    changes = {}
    for name, config in FITS.items():
        rewritten = copy.deepcopy(ours)
        report = rewrite_(rewritten, config, example_inputs=other.float() if other.is_floating_point() else other)
        assert not report.left
        change = logits(rewritten, batch) - logits(ours, batch)
        changes[name] = (change.square().mean().sqrt() / logits(ours, batch).std()).item()
    return {
        "model": case.name,
        "saved_as": case.saved_as,
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "notes": notes,
        "float64_largest_difference_over_largest_logit": relative,
        "float32_largest_difference": difference,
        "float32_largest_logit": logits(ours, batch).abs().max().item(),
        "change_by_fits_over_std_of_logits": changes,
    }


def main() -> None:
    rows = []
    for case in CASES:
        row = measure(case)
        rows.append(row)
        fits = "  ".join(f"{name} {change:.1e}" for name, change in row["change_by_fits_over_std_of_logits"].items())
        relative = row["float64_largest_difference_over_largest_logit"]
        print(
            f"{case.name:45} {row['parameters']:>11,}  float64 {relative:.1e}"
            f"  float32 {row['float32_largest_difference']:.1e} of {row['float32_largest_logit']:.1f}  {fits}",
            flush=True,
        )
    result = {
        "date": date.today().isoformat(),
        "hardware": f"{torch.get_num_threads()} threads of a {platform.machine()} CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "timm": timm.__version__,
        "tolerance_float64": TOLERANCE,
        "models": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row["model"] for row in rows if row["float64_largest_difference_over_largest_logit"] > TOLERANCE]
    if wrong:
        raise SystemExit(f"logits differ: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
