"""`blt-titan export`, by its old name."""

import sys

from blt_titan.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
