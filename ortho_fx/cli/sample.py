"""`ortho-fx sample`: lets a trained GPT-2 continue a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ortho_fx.cli.mistakes import say
from ortho_fx.cli.parser import Commands, Number, Parser, Whole
from ortho_fx.errors import OrthoFxError


def add(commands: Commands[Parser]) -> None:
    command = commands.add_parser(
        "sample",
        help="let a trained GPT-2 continue a text",
        description="Prints a text and what a trained GPT-2 makes of it. The model sees as many tokens as its context "
        "has; a longer text slides through.",
        epilog="examples: ortho-fx sample runs/gpt2-tiny-hermite3 --prompt 'def ' --temperature 0.7; "
        "ortho-fx sample gpt2/model.safetensors --tokenizer gpt2/tokenizer.json --top-k 50 --seed 1",
        allow_abbrev=False,
    )
    command.add_argument("weights", metavar="RUN_OR_WEIGHTS", help="directory of a run, or weights in a file or folder")
    command.add_argument("--prompt", help="text to continue (default: an empty line, or the mark of a new document)")
    command.add_argument("--tokens", type=Whole(1, 10**6), default=200, help="tokens to draw (default 200)")
    command.add_argument(
        "--temperature", type=Number(0), default=0.8, help="less than 1 for less chance, 0 for none (default 0.8)"
    )
    command.add_argument("--top-k", type=Whole(1), help="draw among so many of the likeliest tokens (default: all)")
    command.add_argument("--seed", type=Whole(0), default=0, help="seed of the draws (default 0)")
    command.add_argument("--tokenizer", help="bytes, or a tokenizer.json (default: that of the run's data)")
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    if parsed.prompt == "":
        raise OrthoFxError("the prompt is empty: leave --prompt out for the start of a text")
    # Imported here, because these imports are slow, and a wrong option should be reported at once.
    import torch

    from ortho_fx.models.data.vocabulary import vocabulary_of
    from ortho_fx.models.gpt2 import GPT2
    from ortho_fx.models.sample import sample
    from ortho_fx.models.weights.layouts import load_pretrained

    weights = Path(parsed.weights)
    pretrained = load_pretrained(weights)
    model = pretrained.model
    if not isinstance(model, GPT2):
        raise OrthoFxError(f"{weights} is a {pretrained.kind}, which makes no text: only a gpt2 does")
    vocabulary = vocabulary_of(weights, parsed.tokenizer)
    if parsed.prompt is not None:
        prompt = vocabulary.encode(parsed.prompt)
    else:
        prompt = vocabulary.encode("\n") if vocabulary.end is None else [vocabulary.end]
    if not prompt:
        raise OrthoFxError("the tokenizer makes no token of the prompt: choose another --prompt")
    drawn = sample(
        model,
        torch.tensor(prompt),
        parsed.tokens,
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        vocabulary=min(vocabulary.size, model.config.vocabulary),
        generator=torch.Generator().manual_seed(parsed.seed),
    )
    for note in pretrained.notes:  # now, since an error is one line
        say(f"{weights}: {note}", sys.stderr)
    shown = prompt if parsed.prompt is not None else []
    say(vocabulary.decode([*shown, *drawn.tolist()]))
    return 0
