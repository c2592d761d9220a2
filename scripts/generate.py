"""`blt-titan generate`, by its old name."""

import sys

from blt_titan.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
