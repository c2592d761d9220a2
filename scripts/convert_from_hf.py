"""`blt-titan import`, by its old name."""

import sys

from blt_titan.commands.import_ import main

if __name__ == "__main__":
    sys.exit(main())
