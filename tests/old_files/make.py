"""Writes the files of an earlier ortho_fx that tests/test_old_files.py reads: `python make.py FOLDER`, in its checkout.

The files are pickled models with every kind of site, each with its output for one input; and a run of four steps, with
its checkpoints, its weights and its expansions. The script uses only names that the first version had.
"""

import os
import sys
from pathlib import Path

import torch
from old_models import Calls, Kept, sequential
from torch import fx

import ortho_fx
from ortho_fx.models import gpt2
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.training import train

SMALL = gpt2.GPT2Config(vocabulary=256, context=8, layers=1, heads=1, width=8)


def config():
    """The config of a run of four steps in the current folder."""
    return TrainConfig(
        basis="hermite",
        data="text.txt",
        steps=4,
        batch_size=2,
        lr=1e-2,
        warmup=1,
        compile=False,
        eval_every=4,
        save_every=2,
        out="run",
    )


def rewritten(model, basis, degree=None, *, inputs=None, **settings):
    ortho_fx.rewrite_(model, ortho_fx.ExpansionConfig(basis, degree, **settings), example_inputs=inputs)
    return model


def models(x):
    """Yields a name and a model for every kind of site."""
    for basis in ("hermite", "fourier", "tropical", "tropical_rational"):
        model = rewritten(sequential(), basis)
        ortho_fx.calibrate_(model, [x])
        yield basis, model
    settings = {"granularity": "channel", "clamp": 4.0, "init": "fit", "tied": True}
    yield "channels", rewritten(sequential(), "fourier", 3, inputs=x, **settings)
    yield "calls", rewritten(Calls(), "hermite", 3)
    yield "attribute", rewritten(Kept(), "hermite", 3)
    yield "graph", rewritten(fx.symbolic_trace(Calls()), "hermite", 3)
    frozen = rewritten(sequential(), "hermite", 3)
    ortho_fx.freeze_(frozen)
    yield "frozen", frozen
    annealed = sequential()
    annealing = ortho_fx.Annealing(annealed, degree=2, batches=[x], steps=10)
    for _ in range(3):
        annealing.step()
    yield "annealed", annealed


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    outputs = {"x": x}
    for name, model in models(x):
        model.eval()
        torch.save(model, folder / f"{name}.pt")
        outputs[name] = model(x).detach()
    torch.save(outputs, folder / "outputs.pt")
    os.chdir(folder)
    Path("text.txt").write_text("To be, or not to be, that is the question. " * 50)
    gpt2.PRESETS["tiny"] = SMALL
    train(config())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
