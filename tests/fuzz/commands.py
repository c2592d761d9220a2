"""Command lines: for each command its options with values, and what of its inputs gets damaged."""

import json
from collections.abc import Callable

from tests.fuzz.base import DATA, HF, MODELS, RUN, SMALL
from tests.fuzz.draw import FOLDER_NAMES, HUGE, ODD_STRINGS, Draw, Option
from tests.fuzz.lines import data_set, finish, output_path, perhaps_damage, perhaps_elsewhere
from tests.fuzz.operating import check_cuda, checkpoint, plan, simulate, slurm, status
from tests.fuzz.options import CALIBRATE, EVALUATE, GENERATE, INSPECT, PORT, PREPARE, SCORE, TO_HF, VIEW
from tests.fuzz.place import Place
from tests.fuzz.settings import run_config
from tests.fuzz.sources import write_tree
from tests.fuzz.training import train
from tests.fuzz.watch import Case


def prepare_data(draw: Draw, place: Place) -> Case:
    """Text of all kinds into byte shards."""
    case = Case("prepare_data", [], left_by_error=["out", "cwd/work"])
    case.done += write_tree(draw, place.folder / "in/src")
    source = [place.path("in/src")]
    files = sorted(path for path in (place.folder / "in/src").rglob("*") if path.is_file())
    kind = draw.randrange(14)
    if kind == 0:
        source = [
            f"{place.path('in/src')}/{draw.choice(['*', '**', '**/*', '**/*.txt', '[', '*.jsonl*', '*/', 'w[1]/*'])}"
        ]
    elif kind == 1 and files:
        source = [place.path(f"in/{path.relative_to(place.folder / 'in')}") for path in draw.sample(files, 1)]
    elif kind == 2:
        source.append(draw.choice([source[0], f"{source[0]}/*", "nosuch:///x", "hf:no/such", "memory://x/y", "x\ny"]))
    elif kind == 3:
        nowhere = draw.choice([place.path("in/nothing"), "", "x" * 300, "nosuch://x", "hf:", "python-stdli"])
        source.append(nowhere)
        case.refused.append(f"source {nowhere!r}")
    case.arguments = ["--source", *source]
    if draw.chance(0.15):
        place.copy(SMALL, "out")
        (place.folder / "out/notes.txt").write_text("mine")
        case.kept.append("out/notes.txt")
        perhaps_damage(draw, case, place, "out", 0.3)
        case.done.append("a data set is there")
        case.arguments += ["--out", place.path("out")]
    else:
        case.arguments += ["--out", output_path(draw, case, place)]
    if draw.chance(0.1):
        case.arguments += ["--work", "work"]
    workers, refused = draw.choices(
        [("1", False), ("2", False), ("0", True), ("-1", True), (HUGE, True)], [94, 1, 2, 2, 1]
    )[0]
    case.arguments += ["--workers", workers]
    if refused:
        case.refused.append(f"--workers {workers}")
    return finish(draw, case, PREPARE)


def inspect_data(draw: Draw, place: Place) -> Case:
    """Byte shards, damaged more often than not."""
    case = Case("inspect_data", [], writable=[])
    case.arguments = [data_set(draw, case, place, 0.75)]
    finish(draw, case, INSPECT)
    if changed := [] if "--no-verify" in case.arguments else _damaged_shards(place):
        case.refused.append(f"call {', '.join(changed)} sound")
    return case


def _damaged_shards(place: Place) -> list[str]:
    """Name the shards that are not as they were made, under a manifest that still is."""
    changed = [path for name in (DATA, SMALL) for path in place.changed(name) if path.count("/") == 1]
    is_of_text = [path for path in changed if path.endswith((".arrow", ".npy"))]
    return [] if any(path.endswith("manifest.json") for path in changed) else is_of_text


def score_entropies(draw: Draw, place: Place) -> Case:
    """Entropies beside the shards."""
    case = Case("score_entropies", [])
    data = data_set(draw, case, place, 0.3)
    models = place.copy(MODELS)
    perhaps_damage(draw, case, place, f"in/{MODELS}/entropy", 0.3)
    checkpoint = perhaps_elsewhere(draw, case, place, f"{models}/{draw.choice(['entropy'] * 8 + ['blt', 'of_run'])}")
    case.arguments = ["--data", data, "--checkpoint", checkpoint]
    # Which name it is does not matter: one that leads elsewhere is refused.
    case.writable = case.left_by_error = [f"in/{name}/entropies" for name in (DATA, SMALL)]
    return finish(draw, case, SCORE)


def calibrate_threshold(draw: Draw, place: Place) -> Case:
    """A threshold of entropies."""
    case = Case("calibrate_threshold", [])
    case.arguments = ["--data", data_set(draw, case, place, 0.3)]
    (place.folder / "out").mkdir(exist_ok=True)
    if draw.chance(0.4):
        case.arguments += [
            "--json",
            output_path(draw, case, place, "out/patch_lengths.json") if draw.chance(0.5) else place.path("out/x.json"),
        ]
    if draw.chance(0.05):
        case.arguments += ["--png", place.path(draw.choice(["out/a.png", "out/a.xyz", "out/no/a.png", "out"]))]
    return finish(draw, case, CALIBRATE)


def view_patches(draw: Draw, place: Place) -> Case:
    """A page of patches."""
    case = Case("view_patches", [])
    if draw.chance(0.5):
        case.arguments = ["--text", draw.choice(["to be, or not", "é日本", "\udcff", "<script>", *ODD_STRINGS[:-1]])]
        if draw.chance(0.9):
            models = place.copy(MODELS)
            perhaps_damage(draw, case, place, f"in/{MODELS}/entropy", 0.4)
            case.arguments += ["--checkpoint", f"{models}/entropy"]
    else:
        case.arguments = ["--data", data_set(draw, case, place, 0.4)]
    (place.folder / "out").mkdir(exist_ok=True)
    case.arguments += [
        "--out",
        output_path(draw, case, place, "out/page.html") if draw.chance(0.3) else place.path("out/page.html"),
    ]
    finish(draw, case, VIEW)
    if "--text" in case.arguments:
        # It reads no sidecar.
        case.refused = [what for what in case.refused if not what.startswith("--name")]
    return case


def _model(draw: Draw, case: Case, place: Place) -> list[str]:
    kind = draw.choices(["directory", "checkpoint", "run", "hub"], [5, 4, 1, 0.3])[0]
    if kind == "hub":
        return ["--model", draw.choice(["no/such", "no-such", "a/b/c", "..", "é/x", "no/such@x"])]
    if kind == "directory":
        arguments = ["--model", place.copy(HF)]
        perhaps_damage(draw, case, place, f"in/{HF}")
        return arguments
    models = place.copy(MODELS)
    damaged = draw.choice(["blt", "of_run", "entropy"])
    perhaps_damage(draw, case, place, f"in/{MODELS}/{damaged}", 0.4)
    arguments = ["--model", f"{models}/{'blt' if kind == 'checkpoint' else 'of_run'}"]
    if draw.chance(0.9):
        arguments += ["--entropy-checkpoint", f"{models}/{draw.choice(['entropy'] * 9 + ['blt'])}"]
    return arguments


def evaluate(draw: Draw, place: Place) -> Case:
    """Bits per byte of texts."""
    case = Case("evaluate", [])
    case.arguments = _model(draw, case, place)
    if draw.chance(0.5):
        data = [data_set(draw, case, place, 0.3)]
    else:
        case.done += write_tree(draw, place.folder / "in/src")
        data = [perhaps_elsewhere(draw, case, place, place.path("in/src"))]
    case.arguments += ["--data", *data]
    (place.folder / "out").mkdir(exist_ok=True)
    if draw.chance(0.4):
        case.arguments += [
            "--out",
            output_path(draw, case, place, "out/scores.json") if draw.chance(0.3) else place.path("out/s.json"),
        ]
    return finish(draw, case, EVALUATE)


def generate(draw: Draw, place: Place) -> Case:
    """Texts continued."""
    case = Case("generate", [])
    case.arguments = _model(draw, case, place)
    kind = draw.randrange(3)
    if kind == 0:
        case.arguments += [f"--prompt={draw.choice(['The quick', 'é', chr(0xDCFF), *ODD_STRINGS[:-1]])}"]
    elif kind == 1:
        case.arguments += ["--prompt", "-"]
        case.stdin = draw.text()
    else:
        (place.folder / "in/prompts").write_bytes(draw.text(60))
        case.arguments += ["--batch", perhaps_elsewhere(draw, case, place, place.path("in/prompts"))]
    return finish(draw, case, GENERATE)


def convert_to_hf(draw: Draw, place: Place) -> Case:
    """A checkpoint into a model directory."""
    case = Case("convert_to_hf", [])
    models = place.copy(MODELS)
    perhaps_damage(draw, case, place, f"in/{MODELS}/{draw.choice(['blt', 'entropy'])}", 0.4)
    checkpoint = perhaps_elsewhere(draw, case, place, f"{models}/{draw.choice(['blt'] * 8 + ['of_run', 'entropy'])}")
    case.arguments = ["--checkpoint", checkpoint]
    if draw.chance(0.8):
        case.arguments += ["--entropy-checkpoint", f"{models}/{draw.choice(['entropy'] * 8 + ['blt'])}"]
    if draw.chance(0.1):
        lengths = place.folder / "in/patch_lengths.json"
        try:
            lengths.write_text(json.dumps({"cut_share": draw.json_value()} if draw.chance(0.7) else draw.json_value()))
        except ValueError:
            lengths.write_bytes(b"\xff")
        case.arguments += ["--patch-lengths", place.path("in/patch_lengths.json")]
    if draw.chance(0.15):
        place.copy(HF, "out")
        case.arguments += ["--out", place.path("out")]
    else:
        case.arguments += ["--out", output_path(draw, case, place)]
    return finish(draw, case, TO_HF)


def convert_from_hf(draw: Draw, place: Place) -> Case:
    """A model directory into a checkpoint."""
    case = Case("convert_from_hf", [], writable=["out", "out2"])
    model = place.copy(HF)
    perhaps_damage(draw, case, place, f"in/{HF}", 0.6)
    case.arguments = ["--model", perhaps_elsewhere(draw, case, place, model)]
    if draw.chance(0.9):
        case.arguments += ["--out", output_path(draw, case, place)]
    if draw.chance(0.5):
        case.arguments += ["--entropy-out", place.path(draw.choice(["out2", "out2", "out2", "out"]))]
    return finish(draw, case, [Option("--revision", ("main",), ODD_STRINGS, (), often=0.05)])


def serve_plots(draw: Draw, place: Place) -> Case:
    """A folder of runs, whose pages are asked for."""
    case = Case("serve_plots", [], writable=[])
    place.copy(RUN)
    perhaps_damage(draw, case, place, f"in/{RUN}", 0.85)
    if draw.chance(0.1) and (place.folder / f"in/{RUN}/one").is_dir():
        (place.folder / f"in/{RUN}/one").rename(
            place.folder / f"in/{RUN}" / draw.choice(FOLDER_NAMES).replace("/", "-")
        )
    if draw.chance(0.1) and (place.folder / f"in/{RUN}").is_dir():  # damage may have made a file of it
        case.done += write_tree(draw, place.folder / f"in/{RUN}/tree")
    case.arguments = ["--dir", perhaps_elsewhere(draw, case, place, place.path(f"in/{RUN}"))]
    return finish(draw, case, [PORT])


GRAMMAR: dict[Callable[[Draw, Place], Case], float] = {
    run_config: 8,
    prepare_data: 7,
    inspect_data: 4,
    score_entropies: 3,
    calibrate_threshold: 3,
    view_patches: 2,
    evaluate: 3,
    generate: 3,
    convert_to_hf: 3,
    convert_from_hf: 3,
    serve_plots: 2,
    checkpoint: 3,
    status: 2,
    slurm: 2,
    plan: 0.5,
    simulate: 1,
    check_cuda: 0.5,
}
"""What makes a case of each command, and how often it does."""


TRAINING_FROM = 200
"""The number of the first case that may be a training: a short fuzz has none."""


def make_case(draw: Draw, place: Place, number: int, only: str = "") -> Case:
    """Draw a command, its command line and its inputs.

    Args:
        draw: of the case.
        place: its folder.
        number: of the case.
        only: the name of the one command that is wanted, `train` among them; default: any.
    """
    if only:
        return {make.__name__: make for make in (train, *GRAMMAR)}[only](draw, place)
    if number >= TRAINING_FROM and draw.chance(1 / 200):
        return train(draw, place)
    return draw.choices(list(GRAMMAR), list(GRAMMAR.values()))[0](draw, place)
