"""Thin command lines over the packages: `python -m scripts.<verb>`."""

import sys

# Under `python -m`, and only then. What a command imports, torch above all, takes seconds.
if sys.argv[:1] == ["-m"]:
    from scripts.command import end_quietly_while_importing

    end_quietly_while_importing()
