"""Progress on standard error: a bar on a terminal, a line every ten seconds in a file."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

LINE_INTERVAL_S = 10.0
_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} in {elapsed}, {rate_fmt}{postfix}"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} in {elapsed}, {rate_fmt}{postfix}"


class ProgressBar(tqdm):
    """A tqdm bar that writes whole lines, seldom, where standard error is not a terminal.

    Args:
        iterable: what to go through, if `update` is not called.
        disable: show nothing.
        options: those of tqdm; `desc` and `total` above all.
    """

    def __init__(self, iterable: Any = None, *, disable: bool = False, **options: Any):
        self._writes_lines = not sys.stderr.isatty()
        if self._writes_lines:
            # The first line comes after the first ten seconds: short work says nothing but its end.
            options |= {"mininterval": LINE_INTERVAL_S, "maxinterval": LINE_INTERVAL_S, "delay": LINE_INTERVAL_S}
            options["bar_format"] = (
                _LINE if options.get("total") or hasattr(iterable, "__len__") else _LINE_WITHOUT_TOTAL
            )
        super().__init__(iterable, disable=disable, **options)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Show `s` after the rate; in a file, with the next line that is due."""
        super().set_postfix_str(s, refresh and not self._writes_lines)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return what writes a state to `file`."""
        if file.isatty():
            return tqdm.status_printer(file)

        def write_line(state: str) -> None:
            if state:
                file.write(f"{state.strip()}\n")
                file.flush()

        return write_line

    def close(self) -> None:
        """End the bar; in a file its last line stays, whether or not a bar would."""
        if self.disable or not self._writes_lines:
            super().close()
            return
        self.disable = True
        self._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue]
        self.sp(str(self))
