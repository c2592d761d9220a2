"""`python -m blt_titan`, as torchrun starts it: the same as `blt-titan`."""

import sys

from blt_titan.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
