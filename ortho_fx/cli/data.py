"""`ortho-fx data`: converts text once to files of tokens, which runs read from the disk."""

from __future__ import annotations

import argparse

from ortho_fx.cli.mistakes import say
from ortho_fx.cli.parser import Commands, Number, Parser, Whole


def add(commands: Commands[Parser]) -> None:
    command = commands.add_parser(
        "data",
        help="prepare text for training",
        description="Makes train.bin, val.bin and meta.json of a text file, a folder of text files or the source of "
        "Python's standard library: bytes, or tokens of a byte-level BPE that is trained on the text.",
        epilog="examples: ortho-fx data standard-library tokens --tokenizer bpe --vocabulary 4096; "
        "ortho-fx data books/ tokens --tokenizer tokenizer.json; ortho-fx train gpt2 --data tokens",
        allow_abbrev=False,
    )
    command.add_argument("source", help="text file, folder of text files, or standard-library")
    command.add_argument("out", help="folder that is written")
    command.add_argument("--tokenizer", default="bytes", help="bytes (default), bpe, or a tokenizer.json")
    command.add_argument(
        "--vocabulary", type=Whole(257, 2**32), default=4096, help="size of the vocabulary of bpe (default 4096)"
    )
    command.add_argument(
        "--validation-share", type=Number(0), default=0.1, help="share of the files kept for validation (default 0.1)"
    )
    command.add_argument("--seed", type=Whole(0), default=0, help="seed of which files these are (default 0)")
    command.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    from ortho_fx.models.data.prepare import prepare

    report = prepare(
        parsed.source,
        parsed.out,
        tokenizer=parsed.tokenizer,
        vocabulary=parsed.vocabulary,
        validation_share=parsed.validation_share,
        seed=parsed.seed,
        overwrite=parsed.overwrite,
    )
    say(report)
    return 0
