"""A timm model with learnable activations under timm's own optimizer, schedule and loss, on scikit-learn's digits.

    pip install timm scikit-learn
    python examples/timm_training.py [--model resnet10t] [--basis hermite] [--degree 3] [--epochs 3] [--keep]

The weights are random: nothing is downloaded. timm's `create_optimizer_v2` asks the model which parameters must not
decay, and a rewritten model names its expansions. For expansions with a learning rate of their own, hand over the
groups of `ortho_fx.param_groups` instead of the model. `--keep` trains the model as it is, to compare with.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, calibrate_, rewrite_

LEARNING_RATE, WEIGHT_DECAY, BATCH, SIZE = 2e-3, 0.05, 64, 32


def make_learnable(model: nn.Module, batch: Tensor, config: ExpansionConfig) -> None:
    """Rewrites the activations, and calibrates them to their inputs on this batch."""
    print(rewrite_(model, config))
    # In training mode a new batch normalisation uses the batch's own statistics, as at the start of the training.
    calibrate_(model.train(), [batch])


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 1, 32, 32) of mean 0 and deviation 1, and their classes: for training, then for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, classes = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    pixels = F.interpolate((pixels - pixels.mean()) / pixels.std(), size=(SIZE, SIZE), mode="nearest")
    parts = train_test_split(pixels, torch.from_numpy(classes), test_size=0.25, random_state=0, stratify=classes)
    return parts[0], parts[2], parts[1], parts[3]


def train(name: str, config: ExpansionConfig | None, epochs: int) -> None:
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    torch.manual_seed(0)
    images, classes, held, held_classes = digits()
    model = timm.create_model(name, num_classes=10, in_chans=1)
    if config is not None:
        make_learnable(model, images[:BATCH], config)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    updates = len(images) // BATCH
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, step_on_epochs=False, updates_per_epoch=updates
    )
    loss_of = LabelSmoothingCrossEntropy(0.1)
    for epoch in range(epochs):
        model.train()
        losses = []
        for update, chosen in enumerate(torch.randperm(len(images))[: updates * BATCH].split(BATCH)):
            optimizer.zero_grad()
            loss = loss_of(model(images[chosen]), classes[chosen])
            loss.backward()
            optimizer.step()
            schedule.step_update(epoch * updates + update + 1)
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            predicted = torch.cat([model(part).argmax(1) for part in held.split(BATCH)])
        accuracy = (predicted == held_classes).float().mean().item()
        print(f"epoch {epoch + 1}: loss {sum(losses) / updates:.3f}, validation accuracy {accuracy:.1%}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet10t", help="any of timm's that takes images of 32 pixels")
    parser.add_argument("--basis", default="hermite")
    parser.add_argument("--degree", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the model's activations")
    parsed = parser.parse_args(arguments)
    config = None if parsed.keep else ExpansionConfig(parsed.basis, parsed.degree)
    train(parsed.model, config, parsed.epochs)


if __name__ == "__main__":
    main()
