"""transformers' Trainer on a GPT-2 with learnable activations: rewritten, calibrated, trained, saved and loaded again.

    pip install "transformers[torch]"
    python examples/transformers_trainer.py [--steps 100] [--out DIRECTORY]

The model is small and starts from random weights, and the text is the source of a module of the standard library, in
bytes: nothing is downloaded. With pretrained weights, rewrite after `from_pretrained`, with init="fit".

Three lines differ from a run without ortho_fx: `enable()`, `rewrite_`, and the mixin of the Trainer. It calibrates the
expansions on batches of the training set, and keeps weight decay from them. config.json describes the expansions, so
`from_pretrained` loads the model as any other.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ortho_fx import ExpansionConfig, rewrite_

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


def train(steps: int, out: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    from ortho_fx.integrations.transformers import ExpansionTrainerMixin, enable

    class ExpansionTrainer(ExpansionTrainerMixin, Trainer):  # type: ignore[misc]
        """A Trainer for models with expansions."""

    enable()
    set_seed(0)
    data = Bytes(Path(argparse.__file__).read_bytes())
    size = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(size)
    print(rewrite_(model, CONFIG))
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, logging_steps=max(1, steps // 5),
        learning_rate=1e-3, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=steps // 10,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(), seed=0,
    )  # fmt: skip
    trainer = ExpansionTrainer(model=model, args=arguments, train_dataset=data, calibrate_batches=1)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    print(f"loss of the first steps {float(rows[0]['loss']):.3f}, of the last {float(rows[-1]['loss']):.3f}")
    for name, change in rows[-1].items():
        if name.startswith("expansions/"):
            print(f"{name} {float(change):.3f}")

    trainer.save_model(str(out))
    again = AutoModelForCausalLM.from_pretrained(out).to(model.device)
    model.eval()
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
