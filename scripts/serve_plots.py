"""`blt-titan plots`, by its old name."""

import sys

from blt_titan.commands.plots import main

if __name__ == "__main__":
    sys.exit(main())
