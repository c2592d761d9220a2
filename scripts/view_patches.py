"""`blt-titan view`, by its old name."""

import sys

from blt_titan.commands.view import main

if __name__ == "__main__":
    sys.exit(main())
