"""Command lines of the verbs around a run: its checkpoints, how it stands, its job, and what it takes and costs.

What takes a dry run is asked wrongly more often than not: a right one takes ten seconds of a core.
"""

from tests.fuzz.base import OPERATED
from tests.fuzz.draw import Draw
from tests.fuzz.lines import finish, output_path, perhaps_damage, perhaps_elsewhere
from tests.fuzz.options import CHECK_CUDA, CHECKPOINT, PLAN, SIMULATE, SLURM
from tests.fuzz.options import JSON as AS_JSON
from tests.fuzz.place import Place
from tests.fuzz.settings import draw_file_and_overrides, small_run, toml_value
from tests.fuzz.training import INTEGERS
from tests.fuzz.watch import Case

_WRONG_SETTINGS = (
    *("--training.seq_len=0", "--training.seq_len=255", "--data.streams=0", "--model.flavor=nosuch", "--model.name=x"),
    *("--parallelism.tensor_parallel_degree=0", "--parallelism.context_parallel_degree=64", "--training.x=1"),
    *("--patching.max_patch_bytes=512", "--optimizer.lr=nan", "--training.steps=0", "--data.segment_patches=0"),
)
"""Overrides of `small_run` that no number of GPUs makes right."""


def checkpoint(draw: Draw, place: Place) -> Case:
    """The checkpoints of a run: listed, verified, pruned, rolled back."""
    what = draw.choice(list(CHECKPOINT))
    case = Case("checkpoint", [], writable=[], touched=[f"in/{OPERATED}/run.lock"])
    folder = _operated(draw, case, place)
    if draw.chance(0.1):
        # What a run of any settings could have written there, and what no run does.
        folder_of_checkpoints = draw.json_value()
        where = toml_value(folder_of_checkpoints) if isinstance(folder_of_checkpoints, str | int | bool) else "[" * 5000
        settings = f"[checkpoint]\nfolder = {where}\n".encode(errors="replace")
        (place.folder / "in" / OPERATED / "config.toml").unlink(missing_ok=True)
        (place.folder / "in" / OPERATED / "config.toml").write_bytes(settings)
        case.done.append("config.toml: another folder")
    below = draw.choice(["", "", "", "/checkpoint"] + ["/checkpoint/step-4"] * (what == "verify"))
    case.arguments = [what, perhaps_elsewhere(draw, case, place, folder + below)]
    if draw.chance(0.03):
        case.arguments[0] = draw.choice(["", "x", "List", "--help.x"])
        case.refused.append(case.arguments[0] or "an empty verb")
    finish(draw, case, CHECKPOINT[what])
    if what in ("verify", "rollback") and below != "/checkpoint/step-4" and len(case.done) == 1 and not case.refused:
        _say_what_is_damaged(case, place)
    if what in ("prune", "rollback") and "--dry-run" not in case.arguments:
        case.writable = [f"in/{OPERATED}/checkpoint"]
    return case


def _say_what_is_damaged(case: Case, place: Place) -> None:
    """Have a step that is complete, but not as it was saved, be called damaged, and not gone back to."""
    words = " ".join(case.arguments).replace("=", " ").split()
    asked = words[words.index("--step") + 1] if "--step" in words else ""
    for path in place.changed(OPERATED):
        folder = (place.folder / "in" / path).parent
        is_saved = folder.parent.name == "checkpoint" and (folder / ".metadata").is_file() and folder.name != "step-10"
        if is_saved and asked in ("", folder.name.removeprefix("step-")) and "--no-verify" not in words:
            case.refused.append(f"call {folder.name} sound")


def status(draw: Draw, place: Place) -> Case:
    """How the run of a folder stands."""
    case = Case("status", [], writable=[])
    case.arguments = [perhaps_elsewhere(draw, case, place, _operated(draw, case, place))]
    if draw.chance(0.3) and (place.folder / f"in/{OPERATED}").is_dir():
        name = draw.choice(["ended.json", "run.lock"])
        (place.folder / f"in/{OPERATED}" / name).unlink(missing_ok=True)
        case.done.append(f"{name}: removed")
    return finish(draw, case, [AS_JSON])


def _operated(draw: Draw, case: Case, place: Place) -> str:
    shown = place.copy(OPERATED)
    perhaps_damage(draw, case, place, f"in/{OPERATED}", 0.6)
    return shown


def slurm(draw: Draw, place: Place) -> Case:
    """A batch script for a run of any settings."""
    case = Case("slurm", [])
    case.arguments = _config(draw, case, place, named="")
    if draw.chance(0.15):
        case.arguments.append("--debug.seed=$SLURM_ARRAY_TASK_ID")
    (place.folder / "out").mkdir(exist_ok=True)
    if draw.chance(0.5):
        case.arguments += ["--out", output_path(draw, case, place, "out/train.sbatch")]
    return finish(draw, case, SLURM)


def plan(draw: Draw, place: Place) -> Case:
    """What a run takes on so many GPUs."""
    case = Case("plan", [], writable=[])
    case.arguments = _config(draw, case, place, small=True)
    _wrong_more_often_than_not(draw, case)
    # A search has degrees of its own.
    if draw.chance(0.1) and "parallelism" not in " ".join(case.refused):
        case.arguments += ["--search", "--tries=1"]
    if draw.chance(0.05):
        case.arguments += ["--estimate-mfu", "--mfu=0.4"]
        case.refused.append("--estimate-mfu and --mfu")
    return finish(draw, case, PLAN)


def check_cuda(draw: Draw, place: Place) -> Case:
    """One step on CUDA, which the torch that runs the fuzz need not be made for."""
    case = Case("check_cuda", [], writable=[])
    case.arguments = _config(draw, case, place, small=True)
    _wrong_more_often_than_not(draw, case)
    return finish(draw, case, CHECK_CUDA)


def simulate(draw: Draw, place: Place) -> Case:
    """The data of a run on so many GPUs, a resume on others, and failures."""
    case = Case("simulate", [], writable=[])
    case.arguments = [*_config(draw, case, place, small=True), "--workers=1"]
    if draw.chance(0.3):
        _wrong_more_often_than_not(draw, case)
    return finish(draw, case, SIMULATE)


def _wrong_more_often_than_not(draw: Draw, case: Case) -> None:
    if draw.chance(0.75):
        wrong = draw.choice(_WRONG_SETTINGS)
        case.arguments.append(wrong)
        case.refused.append(wrong)


def _config(draw: Draw, case: Case, place: Place, *, named: str = "--config", small: bool = False) -> list[str]:
    """Write settings; return what names them, and overrides.

    Args:
        draw: of the case.
        case: is told what must be refused.
        place: its folder.
        named: the option that takes the file; empty if the file has no option.
        small: leave out sizes that would take long.
    """
    settings = small_run(place)
    file, overrides = draw_file_and_overrides(draw, case, place, settings, **({"integers": INTEGERS} if small else {}))
    if file == "/dev/null":
        case.refused.clear()  # what was written is not read
    if draw.chance(0.05):
        file = draw.choice(["debgu", "debug.toml.bak", "", "é", "x" * 300, "..", "a\nb"])
        case.refused.append(f"the configuration {file!r}")
    return [*([named] if named else []), file, *overrides]
