"""`blt-titan prepare`, by its old name."""

import sys

from blt_titan.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
