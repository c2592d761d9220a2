"""`blt-titan inspect`, by its old name."""

import sys

from blt_titan.commands.inspect import main

if __name__ == "__main__":
    sys.exit(main())
