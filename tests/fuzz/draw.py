"""Random choices of a case, and the values, names and texts that they choose from."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")

HUGE = str(10**30)
NOT_INTEGERS = ("nan", "inf", "1.5", "x", "", "1e3")
NOT_NUMBERS = ("nan", "inf", "-inf", "1e400", "x", "")
NOT_SIZES = ("-1", "nan", "inf", "x", "", "1XB", "1.5.2MB", "16 KiB KiB")
NOT_PLAIN_NAMES = ("", ".", "..", "../evil", "../../evil", "a/b", "/absolute", "a/../../../evil")
ODD_COUNTS = ("0", "-1", "-7", str(2**31), str(2**63), HUGE, "007", "1_0", "\u0663")
ODD_NUMBERS = ("0", "-1", "-0.0", "1e-320", "1e300", "-1e30", "1_0.5")
ODD_STRINGS = ("", " ", "x", ".", "..", "/", "é", "a b", "a\nb", "-", "--", "%s", "{}", "[x]", "\x1b[31m", "x" * 5000)

FILE_NAMES = (
    *("a.txt", "b.py", "notes", "README", "with space.txt", "new\nline.txt", "tab\t.txt", "-rf", "--out", "*.txt"),
    *("[x].txt", "a#L1", "é.txt", "日本.txt", "x.json", ".hidden.txt", "%s.txt", "{}", "~", "quote'\".txt", "b\\c"),
    *("\udcff\udcfe.txt", "n" * 200 + ".txt", "CON", "a.TXT", "a..txt", "x.jsonl?download=true", "\x1b[31m.txt"),
)
FOLDER_NAMES = ("sub", "w[1]", "w1", "a b", "*", "new\nline", "\udcff", "é", ".hidden", "x.txt", "deep/er", "{0}")


@dataclass(frozen=True)
class Option:
    """An option of a command, with values by what may be made of them."""

    name: str
    good: tuple[str, ...] = ()
    """None: a flag."""
    odd: tuple[str, ...] = ()
    """Perhaps refused, perhaps done."""
    refused: tuple[str, ...] = ()
    """Never done."""
    often: float = 0.3


class Draw(random.Random):
    """The random numbers of one case; the same seed and number make the same case."""

    def __init__(self, seed: int, number: int):
        super().__init__(f"{seed}:{number}")

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def some(self, items: Sequence[Item], most: int) -> list[Item]:
        return self.sample(items, self.randint(0, min(most, len(items))))

    def text(self, most_bytes: int = 400) -> bytes:
        size = self.choice([0, 1, 2, most_bytes // 8, self.randint(1, most_bytes)])
        kind = self.randrange(6)
        if kind == 0:
            return self.randbytes(size)
        if kind == 1:
            return b"\0" * size
        if kind == 2:
            return ("é日本😀\u2028" * size).encode()[:size]
        return bytes(self.choices(b"abcdefgh  ,.\n\r\t", k=size))

    def file_name(self) -> str:
        return self.choice(FILE_NAMES)

    def json_value(self) -> Any:
        """Anything that JSON can say, and what Python's reader takes beyond it."""
        deep: Any = 1
        for _ in range(self.choice([0, 3, 900])):
            deep = [deep]
        return self.choice(
            [
                *(None, True, False, 0, -1, 1, 1.5, -0.5, 2**31, 2**63, 2**64, 10**400, 1e308),
                *(float("nan"), float("inf"), float("-inf")),
                *("", "x", "..", "../../evil", "/", "1", "nan", "\0", "\ud800", "é" * 3000, "a\nb"),
                *([], {}, [1], ["x"], {"x": 1}, [[]], [None], deep),
            ]
        )

    def options(self, table: Sequence[Option], *, faults: int) -> tuple[list[str], list[str]]:
        """Draw options of a command line.

        Args:
            table: what there is.
            faults: how many get a value that is odd or refused.

        Returns:
            The arguments, and those among them that the command must refuse.
        """
        arguments: list[str] = []
        refused: list[str] = []
        spoilable = [option for option in table if option.odd or option.refused]
        spoiled = self.sample(spoilable, min(faults, len(spoilable)))
        for option in table:
            if option in spoiled:
                value = self.choice(option.odd if option.odd and self.chance(0.7) else option.refused or option.odd)
                if value in option.refused:
                    refused.append(f"{option.name}={value}")
            elif self.chance(option.often):
                if not option.good:
                    arguments.append(option.name)
                    continue
                value = self.choice(option.good)
            else:
                continue
            arguments += [f"{option.name}={value}"] if self.chance(0.5) or value[:1] == "-" else [option.name, value]
        return arguments, refused
