"""`blt-titan score`, by its old name."""

import sys

from blt_titan.commands.score import main

if __name__ == "__main__":
    sys.exit(main())
