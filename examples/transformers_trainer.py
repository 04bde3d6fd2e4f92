"""transformers' Trainer on a GPT-2 with learnable activations: rewritten, calibrated, trained, saved and loaded again.

    pip install "transformers[torch]"
    python examples/transformers_trainer.py [--steps 100] [--out DIRECTORY]

The model is small and starts from random weights, and the text is the source of a module of the standard library, in
bytes: nothing is downloaded. With pretrained weights, rewrite after `from_pretrained`, with init="fit".

Three things differ from a run without ortho_fx: `rewrite_` before the optimizer is made, the optimizer made of
`param_groups`, and the expansions' config kept beside the weights, because a model is rewritten before it loads them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ortho_fx import ExpansionConfig, calibrate_, param_groups, rewrite_

CONFIG = ExpansionConfig(basis="hermite", degree=3)
LENGTH, BATCH = 64, 16


class Bytes(Dataset[dict[str, Tensor]]):
    """Pieces of a text; GPT-2 shifts the labels itself."""

    def __init__(self, text: bytes) -> None:
        whole = len(text) // LENGTH * LENGTH
        self.pieces = torch.tensor(list(text[:whole])).view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def make_learnable(
    model: nn.Module, batch: Tensor | Mapping[str, Tensor], config: ExpansionConfig = CONFIG
) -> torch.optim.Optimizer:
    """Rewrites the activations, calibrates them to their inputs on this batch, and returns the optimizer."""
    print(rewrite_(model, config))
    print(calibrate_(model, [batch]))
    return torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.1))


def load_learnable(model: nn.Module, directory: Path) -> None:
    """Rewrites a new model like the saved one, and loads the weights of the model and its expansions."""
    from safetensors.torch import load_model  # it handles tied weights, which are saved once

    rewrite_(model, ExpansionConfig.from_dict(json.loads((directory / "expansion.json").read_text())))
    load_model(model, directory / "model.safetensors")


def train(steps: int, out: Path) -> None:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainingArguments,
        get_cosine_schedule_with_warmup,
        set_seed,
    )

    set_seed(0)
    data = Bytes(Path(argparse.__file__).read_bytes())
    size = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(size)
    optimizer = make_learnable(model, {"input_ids": data.pieces[:BATCH]})
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, logging_steps=max(1, steps // 5),
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(), seed=0,
    )  # fmt: skip
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, schedule))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss of the first steps {float(losses[0]):.3f}, of the last {float(losses[-1]):.3f}")

    trainer.save_model(str(out))
    (out / "expansion.json").write_text(json.dumps(CONFIG.to_dict()))
    again = GPT2LMHeadModel(size).to(model.device)
    load_learnable(again, out)
    model.eval(), again.eval()
    batch = data.pieces[:4].to(model.device)
    with torch.no_grad():
        print("logits after loading are equal:", torch.equal(model(batch).logits, again(batch).logits))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="where the model is saved (default: a temporary directory)")
    parsed = parser.parse_args(arguments)
    if parsed.out is not None:
        train(parsed.steps, parsed.out)
        return
    with tempfile.TemporaryDirectory() as directory:
        train(parsed.steps, Path(directory))


if __name__ == "__main__":
    main()
