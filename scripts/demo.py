"""`blt-titan demo`, by its old name."""

import sys

from blt_titan.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
