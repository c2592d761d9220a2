"""`blt-titan harness`, by its old name."""

import sys

from blt_titan.commands.harness import main

if __name__ == "__main__":
    sys.exit(main())
