"""Settings of a run: a TOML and overrides, from which a few random keys of all sections are set well or badly."""

import dataclasses
import shlex
import types
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from blt_titan.config.check import load_run_config
from tests.fuzz.base import DATA, MODELS, STREAMS
from tests.fuzz.damage import damage
from tests.fuzz.draw import ODD_STRINGS, Draw
from tests.fuzz.place import Place
from tests.fuzz.watch import Case

NEVER_SET = ("job.config_file", "job.custom_config_module")
INTEGERS = (0, -1, 1, 2, 3, 7, 64, 128, 512, 10**6, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
NUMBERS = (0.0, -0.0, -1.0, 1e-3, 0.1, 0.5, 1.0, 1.5, 100.0, 1e18, 1e300, -1e300, 5e-324)
WRONG = {int: (1.5, "x", True, [], {}), float: ("x", True, [], float("nan")), str: (1, True, []), bool: (1, "x", 0.0)}
"""Values of another type, and what is no number: never to be taken."""


@cache
def all_keys() -> dict[str, Any]:
    """Return the type of every key of every section, by its name with dots."""
    return _keys_of(type(load_run_config([])), "")


def _keys_of(cls: type, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= _keys_of(hint, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        else:
            found[prefix + name] = hint
    return found


def value_of(draw: Draw, hint: Any, integers: Sequence[int] = INTEGERS) -> tuple[Any, bool]:
    """Draw a value for a type, and whether it must be refused."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return value_of(draw, draw.choice([option for option in options if option is not type(None)]), integers)
    if origin is Literal:
        return (draw.choice(options), False) if draw.chance(0.7) else (draw.choice(["x", "", 1]), True)
    if hint in WRONG and draw.chance(0.12):
        return draw.choice(WRONG[hint]), True
    if hint is bool:
        return draw.chance(0.5), False
    if hint is int:
        return draw.choice(integers), False
    if hint is float:
        return draw.choice(NUMBERS), False
    if hint is str:
        return draw.choice([*ODD_STRINGS, "foo", "cpu", "\0", "/proc/x", "../../evil", "a/b", "model"]), False
    if origin is list:
        return [value_of(draw, options[0])[0] for _ in range(draw.randrange(3))], False
    if origin is dict:
        names = ["x", "", "../in/data", DATA]
        return {draw.choice(names): value_of(draw, options[1])[0] for _ in range(draw.randrange(3))}, False
    return draw.choice([1, "x", [], {}]), False


def small_run(place: Place) -> dict[str, Any]:
    """Return settings of a run of seconds that are right."""
    return {
        "job.dump_folder": place.path("out/run"),
        "model.name": "blt",
        "model.flavor": "debug",
        "data.streams": STREAMS,
        "data.segment_bytes": 128,
        "data.segment_patches": 40,
        "patching.rule": "space",
        "patching.max_patch_bytes": 128,
        "training.dataset_path": place.copy(DATA),
        "training.seq_len": 256,
        "training.local_batch_size": 1,
        "training.global_batch_size": 2,
        "training.steps": 2,
        "training.mixed_precision_param": "float32",
        "training.dataloader.num_workers": 0,
        "metrics.log_freq": 1,
        "lr_scheduler.warmup_steps": 1,
        "activation_checkpoint.mode": "none",
        "checkpoint.enable": False,
        "debug.seed": 0,
    }


def run_config(draw: Draw, place: Place) -> Case:
    """Make a case of the settings check."""
    settings = small_run(place)
    case = Case("run_config", [])
    if draw.chance(0.15):
        by_entropy = {"patching.rule": "global", "patching.threshold": 1.0}
        if draw.chance(0.5):
            by_entropy |= {"patching.source": "online", "patching.entropy_checkpoint": place.copy(MODELS) + "/entropy"}
            _perhaps_damage(draw, case, place, f"in/{MODELS}/entropy")
        settings |= by_entropy
    if draw.chance(0.1):
        settings |= {"checkpoint.enable": True, "checkpoint.initial_load_path": place.copy(MODELS) + "/blt"}
        _perhaps_damage(draw, case, place, f"in/{MODELS}/blt")
    if draw.chance(0.1):
        # What an earlier run left.
        (place.folder / "out").mkdir(exist_ok=True)
        place.copy(f"{MODELS}/of_run", "out/run")
        settings |= {"checkpoint.enable": True, "checkpoint.load_step": draw.choice([-1, 0, 1, 7, 20])}
        _perhaps_damage(draw, case, place, "out/run")
    if draw.chance(0.1):
        _perhaps_damage(draw, case, place, f"in/{DATA}")
    if draw.chance(0.05):
        settings["validation.enable"] = True
    draw_settings(draw, case, place, settings)
    if draw.chance(0.06):
        case.environment[draw.choice(["NGPU", "NNODES"])] = draw.choice(["0", "-1", "x", "", "1.5", "2", "10" * 20])
    return case


def _perhaps_damage(draw: Draw, case: Case, place: Place, path: str) -> None:
    if draw.chance(0.5):
        case.done.append(damage(draw, place.folder / path, attack_at=place.folder))


def draw_settings(
    draw: Draw, case: Case, place: Place, settings: dict[str, Any], *, integers: Sequence[int] = INTEGERS
) -> None:
    """Set a few random keys well or badly, in a TOML or as overrides; the command line is that of a rank."""
    file, overrides = draw_file_and_overrides(draw, case, place, settings, integers=integers)
    case.arguments += draw.choice(
        [[f"--job.config_file={file}"], ["--job.config_file", file], [f"--job.config-file={file}"]]
    )
    case.arguments += overrides
    if draw.chance(0.04):
        case.arguments += draw.choice(
            [["--job.config_file"], ["x"], [""], ["--"], ["--="], ["--help.x=1"], ["--x.y"], ["-x"]]
        )
        case.refused.append(shlex.join(case.arguments[-1:]))
    if draw.chance(0.03):
        draw.shuffle(case.arguments)


def draw_file_and_overrides(
    draw: Draw, case: Case, place: Place, settings: dict[str, Any], *, integers: Sequence[int] = INTEGERS
) -> tuple[str, list[str]]:
    """Set a few random keys well or badly; return the name of the TOML, and the overrides as a command line has them.

    Args:
        draw: of the case.
        case: is told what must be refused.
        place: its folder.
        settings: what is right.
        integers: what a whole number may be.
    """
    keys = [key for key in all_keys() if key not in NEVER_SET]
    overrides: dict[str, Any] = {}
    for key in draw.some(list(settings), 1) if draw.chance(0.15) else []:
        del settings[key]
    for key in draw.sample(keys, draw.choice([0, 1, 1, 1, 1, 2, 3])):
        value, refused = value_of(draw, all_keys()[key], integers)
        if key == "job.dump_folder" and ".." in str(value):
            value = place.path("out/other")  # a run may write wherever its settings say
        where = settings if draw.chance(0.5) else overrides
        where[key] = value
        # On a command line everything is a string.
        if refused and not (where is overrides and "str" in str(all_keys()[key])):
            case.refused.append(f"{key} = {value!r}")
    if draw.chance(0.05):
        key = draw.choice(
            ["x.y", "training.lr", "optimizer.LR", "data", "model.name.x", "job.", ".x", "x", "data.séed"]
        )
        (settings if draw.chance(0.5) else overrides)[key] = 1
        # A dot at an end, or a section alone, is a shape of its own.
        case.refused.append(f"{key} = 1")
    for key in list(settings):
        if draw.chance(0.05) and key not in overrides:
            overrides[key] = settings.pop(key)
    file = _write_file(draw, case, place, toml(settings))
    words = []
    for key, value in overrides.items():
        name = key if draw.chance(0.8) else key.replace("_", "-")
        words.append(f"--{name}={_argument(value)}")
    return file, words


def _argument(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("\0", "")


def _write_file(draw: Draw, case: Case, place: Place, text: str) -> str:
    """Write the TOML, at times in a way that is not TOML; return its name."""
    path = place.folder / "in" / draw.choice(["run.toml", "run", "a b.toml", "é.toml", "[x].toml"])
    path.parent.mkdir(exist_ok=True)
    content = text.encode()
    if draw.chance(0.1):
        commented = "# größe\n" + text
        content, what, refused = draw.choice(
            [
                (commented.encode("latin-1"), "Latin-1", True),
                (text.encode("utf-16"), "UTF-16", True),
                (text.encode("utf-8-sig"), "a byte order mark", False),
                (text.replace("\n", "\r\n").encode(), "CR LF", False),
                (text.replace("\n", "\r").encode(), "CR", True),
                (b"", "empty", False),
                (content + b"\0", "NUL at the end", True),
                (content[: draw.randint(0, len(content))], "cut", False),
                (content + b"x = " + b"[" * 5000 + b"]" * 5000, "deep", True),
                (content + b"\nx = " + b"1" * 5000, "a long number", True),
                (content + content, "twice", True),
                (b'{"job": {}}', "JSON", True),
                (content.replace(b"=", b":"), "YAML", True),
                (draw.randbytes(100), "random bytes", True),
            ]
        )
        case.done.append(f"{path.name}: {what}")
        if refused:
            case.refused.append(f"a TOML: {what}")
    path.write_bytes(content)
    case.shown[path.name] = content.decode("utf-8", "backslashreplace")
    if draw.chance(0.04):
        what = draw.choice(["missing", "a folder", "a dangling link", "", "/dev/null", "data", "a long name"])
        if what in ("", "/dev/null"):
            return what
        if what == "a long name":
            return "x" * 300
        if what == "data":
            return place.copy(DATA) + "/train-00000.arrow"
        path.unlink()
        if what == "a folder":
            path.mkdir()
        elif what == "a dangling link":
            path.symlink_to("nowhere")
        case.done.append(f"{path.name}: {what}")
        case.refused.append(f"{path.name}: {what}")
    return place.path(f"in/{path.name}")


def toml(settings: dict[str, Any]) -> str:
    """Write settings as TOML, each section as a table.

    >>> print(toml({"data.streams": 4, "training.dataloader.num_workers": 0, "data.seed": 1}))
    [data]
    streams = 4
    seed = 1
    [training.dataloader]
    num_workers = 0
    <BLANKLINE>
    """
    sections: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{name} = {toml_value(value)}")
    return "".join(
        (f"[{section}]\n" if section else "") + "".join(f"{line}\n" for line in lines)
        for section, lines in sorted(sections.items(), key=lambda item: item[0] != "")
    )


def toml_value(value: Any) -> str:
    """Write one value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(f"\\u{ord(c):04x}" if c in '"\\' or ord(c) < 32 or ord(c) == 127 else c for c in value)
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml_value(key)} = {toml_value(item)}' for key, item in value.items())}}}"
    return repr(value)
