"""What command lines have in common: inputs that may be damaged or elsewhere, outputs, options, and slips."""

from tests.fuzz.base import DATA, SMALL
from tests.fuzz.damage import damage
from tests.fuzz.draw import Draw, Option
from tests.fuzz.place import Place
from tests.fuzz.watch import Case


def count_of_faults(draw: Draw) -> int:
    """Draw how many options of a case are spoiled."""
    return draw.choice([0, 0, 0, 0, 1, 1, 2])


def perhaps_damage(draw: Draw, case: Case, place: Place, path: str, probability: float = 0.5) -> None:
    """Damage what lies at a path below the case's folder, at times more than once."""
    while draw.chance(probability):
        case.done.append(damage(draw, place.folder / path, attack_at=place.folder))
        probability = 0.2


def data_set(draw: Draw, case: Case, place: Place, probability: float = 0.5) -> str:
    """Copy byte shards, at times damaged ones, and return their path."""
    name = draw.choice([DATA, SMALL])
    shown = place.copy(name)
    perhaps_damage(draw, case, place, f"in/{name}", probability)
    return perhaps_elsewhere(draw, case, place, shown)


def perhaps_elsewhere(draw: Draw, case: Case, place: Place, path: str) -> str:
    """Return a path, at times one where nothing of the kind is."""
    if draw.chance(0.05):
        path = draw.choice(
            [place.path("in/nothing"), "", "x" * 300, "/proc/self/mem", "memory://x", "nosuch://x", "/dev/null"]
        )
        case.refused.append(f"input {path!r}")
    return path


def output_path(draw: Draw, case: Case, place: Place, name: str = "out") -> str:
    """Return a path to write, at times one that cannot be written or where something is."""
    if draw.chance(0.15):
        where = draw.choice(["in a file", "in /proc", "empty", "is there", "missing folder", "long", "nul folder"])
        case.done.append(f"output {where}")
        if where == "in a file":
            (place.folder / "in").mkdir(exist_ok=True)
            (place.folder / "in/file").write_text("x")
            case.refused.append("an output inside of a file")
            return place.path("in/file/out")
        if where == "missing folder":
            return place.path("out/a/b/c")
        if where == "is there":
            (place.folder / "out").mkdir(exist_ok=True)
            (place.folder / "out" / "notes.txt").write_text("mine")
            case.kept.append("out/notes.txt")
            return place.path("out")
        path = {"in /proc": "/proc/x", "empty": "", "long": "x" * 300, "nul folder": "/dev/null/x"}[where]
        case.refused.append(f"output {path!r}")
        return path
    return place.path(name)


def finish(draw: Draw, case: Case, table: list[Option]) -> Case:
    """Draw the options of a table, and at times a fault of the whole command line."""
    arguments, refused = draw.options(table, faults=count_of_faults(draw))
    case.arguments += arguments
    case.refused += refused
    if draw.chance(0.03):
        extra = draw.choice(["--nosuch", "extra", "--", "", "-z", "--=1", "é"])
        case.arguments.append(extra)
        if extra not in ("--",):
            case.refused.append(extra or "an empty argument")
    if draw.chance(0.02):
        del case.arguments[draw.randrange(len(case.arguments))]
        # What is left may mean anything.
        case.refused.clear()
        case.done.append("an argument is missing")
        case.writable.append("in")
    return case
