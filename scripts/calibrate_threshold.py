"""`blt-titan calibrate`, by its old name."""

import sys

from blt_titan.commands.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
