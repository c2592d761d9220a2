"""Read a run's settings: a TOML file, then overrides, into torchtitan's JobConfig with our sections.

In: `--job.config_file=FILE` and `--section.key=value`. Out: one object of nested dataclasses, in which every value has
the type that its key wants. Precedence: command line > TOML > default.

The decision that is not obvious: values are read here and not by torchtitan's option parser, which prints a box where a
sentence is wanted and lets assertions through.
"""

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from blt_titan import job_config
from blt_titan.config.run_config import RunConfig
from blt_titan.titan import ConfigManager
from blt_titan.titan import JobConfig as TitanJobConfig

CONFIG_MODULE = "blt_titan.job_config"
CONFIG_FILE_KEY = "job.config_file"
_NONE = ("none", "None", "null")


class RunConfigError(ValueError):
    """Settings that cannot be run.

    Args:
        sentences: one for each fault, which names the key, what it got and what it may be.
    """

    def __init__(self, *sentences: str):
        super().__init__("\n".join(sentences))
        self.sentences = sentences


@cache
def run_config_class() -> type[RunConfig]:
    """Return torchtitan's JobConfig merged with our sections."""
    merged: Any = ConfigManager._merge_configs(TitanJobConfig, job_config.JobConfig)
    for section in get_type_hints(merged).values():
        if hasattr(section, "__post_init__"):
            # Assertions that name no key; `rules` says the same in a sentence.
            section.__post_init__ = lambda self: None
    return merged


def load_run_config(args: list[str]) -> RunConfig:
    """Read the TOML that `--job.config_file` names, and overrides, into torchtitan's JobConfig with our sections.

    Args:
        args: command line without the program's name: `--section.key=value`, `--section.key value`, and for booleans
            `--section.key` and `--section.no-key` too. Lists are separated by commas, tables are written as in TOML.

    Raises:
        RunConfigError: for a file that cannot be read, an unknown section or key, or a value of the wrong type.
    """
    cls = run_config_class()
    if asked := {"-h", "--help"} & set(args):
        raise RunConfigError(f"{min(asked)}: is no key; `blt-titan config --keys` lists every key")
    overrides = list(_overrides(args, cls))
    files = [value for key, value in overrides if key == CONFIG_FILE_KEY]
    if len(files) > 1:
        raise RunConfigError(f"--{CONFIG_FILE_KEY} is given {len(files)} times ({', '.join(files)}): name one file")
    table: dict[str, Any] = {}
    if files:
        table = _read_toml(Path(files[0]))
        _check_table(table, cls, Path(files[0]), prefix="")
    for key, value in overrides:
        *sections, name = key.split(".")
        section = table
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    config = cast(RunConfig, _build(cls, table))
    config.job.custom_config_module = config.job.custom_config_module or CONFIG_MODULE
    return config


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its dotted key, as in `training.dataloader.num_workers`."""
    return dict(_leaves(config, ""))


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def _build(cls: Any, table: dict[str, Any]) -> Any:
    hints = get_type_hints(cls)
    return cls(
        **{key: _build(hints[key], v) if dataclasses.is_dataclass(hints[key]) else v for key, v in table.items()}
    )


def _overrides(args: list[str], cls: type) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and typed values of a command line."""
    rest = iter(args)
    for arg in rest:
        name, equals, text = arg.partition("=")
        if not name.startswith("--") or "." not in name:
            raise RunConfigError(f"{arg!r}: an override is --section.key=value, as in --training.steps=100")
        key, hint, negated = _find(name.removeprefix("--").replace("-", "_"), cls, arg)
        if hint is bool and not equals:
            yield key, not negated
            continue
        if negated:
            raise RunConfigError(f"{arg}: --{name.removeprefix('--')} takes no value; write --{key}=false")
        if not equals:
            text = next(rest, None)
            if text is None or text.startswith("--"):
                raise RunConfigError(f"{name}: a value is missing; write {name}=VALUE, {describe_type(hint)}")
        try:
            yield key, _parse(text, hint)
        except (ValueError, RecursionError) as error:
            raise RunConfigError(f"{name}={text[:100]}: is of the wrong type, must be {describe_type(hint)}") from error


def _find(name: str, cls: type, arg: str) -> tuple[str, Any, bool]:
    """Return the key of an option, its type, and whether the option says `no`."""
    *sections, last = name.split(".")
    hints, prefix = get_type_hints(cls), ""
    for part in sections:
        if part not in hints or not dataclasses.is_dataclass(hints[part]):
            raise RunConfigError(f"{arg}: unknown key {prefix}{part}{_did_you_mean(part, hints, prefix)}")
        hints, prefix = get_type_hints(hints[part]), f"{prefix}{part}."
    if dataclasses.is_dataclass(hints.get(last)):
        raise RunConfigError(f"{arg}: {prefix}{last} is a section; write --{prefix}{last}.key=value")
    if last in hints:
        return prefix + last, hints[last], False
    meant = last.removeprefix("no_")
    if meant != last and hints.get(meant) is bool:
        return prefix + meant, bool, True
    raise RunConfigError(f"{arg}: unknown key {prefix}{last}{_did_you_mean(last, hints, prefix)}")


def _did_you_mean(part: str, known: Any, prefix: str) -> str:
    close = difflib.get_close_matches(part, known, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _parse(text: str, hint: Any) -> Any:
    """Turn the text of an override into a value of its key's type; ValueError if it is none."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in options and text in _NONE:
            return None
        for option in options:
            if option is not type(None):
                try:
                    return _parse(text, option)
                except ValueError:
                    continue
        raise ValueError(text)
    if hint in (int, float):
        return hint(text)
    if hint is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else _refuse(text)
    if origin is Literal:
        return text if text in options else _refuse(text)
    if origin is list and get_origin(options[0]) is not list:
        return [_parse(item, options[0]) for item in text.split(",")] if text else []
    if origin in (list, dict):
        value = tomllib.loads(f"value = {text}")["value"]
        return value if _fits(value, hint) else _refuse(text)
    return text


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        written = path.read_bytes()
    except (OSError, ValueError) as error:
        raise RunConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        return tomllib.loads(written.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RunConfigError(
            f"{path}: is not UTF-8, as TOML must be (byte {error.start} is {written[error.start]:#04x}): save it so"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError alone
        lone_returns = b"\r" in written.replace(b"\r\n", b"")
        why = "; its lines end in CR alone: save it with LF or CRLF" if lone_returns else ""
        raise RunConfigError(f"{path} is not valid TOML: {error}{why}") from error


def _check_table(table: dict[str, Any], cls: type, path: Path, prefix: str) -> None:
    """Refuse keys that are unknown and values whose type does not fit, naming the file and the key."""
    hints = get_type_hints(cls)
    for key, value in table.items():
        name = prefix + key
        if key not in hints:
            raise RunConfigError(f"{path}: unknown key {name}{_did_you_mean(key, hints, prefix)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise RunConfigError(f"{path}: {name} = {value!r} must be a table, [{name}]")
            _check_table(value, hint, path, prefix=f"{name}.")  # pyright: ignore[reportArgumentType]
        elif not _fits(value, hint):
            raise RunConfigError(f"{path}: {name} = {value!r} is of the wrong type, must be {describe_type(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in options)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, options[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, options[1]) for item in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe_type(hint: Any) -> str:
    """Return the type of a key in words, as after "must be"; that it may also be unset is not said."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, options))
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(option) for option in options if option is not type(None))
    if origin is list:
        return f"a list of {describe_type(options[0])}"
    if origin is dict:
        return f"a table of {describe_type(options[1])}"
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(hint) or str(hint)
