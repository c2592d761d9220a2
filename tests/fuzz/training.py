"""A real training of one or two steps on random settings: what the check of the settings lets pass, trains."""

from tests.fuzz.draw import Draw
from tests.fuzz.place import Place
from tests.fuzz.settings import draw_settings, small_run
from tests.fuzz.watch import Case

INTEGERS = (0, -1, 1, 2, 3, 7)
"""A larger number may be right, and too much for a test."""


def train(draw: Draw, place: Place) -> Case:
    """Make a case of training; half of them start a second time after damage to what the first left."""
    settings = small_run(place) | {"checkpoint.enable": draw.chance(0.6), "checkpoint.interval": 1}
    case = Case("train", [], left_by_error=["out"])
    draw_settings(draw, case, place, settings, integers=INTEGERS)
    case.arguments.append("--training.steps=2")
    if draw.chance(0.5):
        case.again = ["--training.steps=3", f"--optimizer.lr={draw.choice(['1e-3', '1e18'])}"]
        case.damaged_between = "out/run" if draw.chance(0.5) else ""
    return case
