"""`python -m ortho_fx.cli` runs `ortho-fx`; torchrun needs this form."""

import sys

from ortho_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
