"""The commands by their old names, `python -m scripts.<name>`; `blt-titan` is the command."""

import sys

# Under `python -m`, and only then. What a command imports, torch above all, takes seconds.
if sys.argv[:1] == ["-m"]:
    from blt_titan.commands.ending import end_quietly_while_importing

    end_quietly_while_importing("blt-titan")
