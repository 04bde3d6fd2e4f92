"""`python -m ortho_fx.cli` is `ortho-fx`, as torchrun starts it."""

import sys

from ortho_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
