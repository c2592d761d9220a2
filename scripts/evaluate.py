"""`blt-titan evaluate`, by its old name."""

import sys

from blt_titan.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
