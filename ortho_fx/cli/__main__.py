"""`python -m ortho_fx.cli` runs `ortho-fx`; torchrun needs this form."""

from ortho_fx.cli import command

if __name__ == "__main__":
    command()
