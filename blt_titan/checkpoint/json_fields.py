"""Objects of JSON that others may have written: read with limits, and checked field by field before anything is built.

A table says of each field what it may be; what comes out holds exactly the table's fields, so that nothing unchecked
can be read.

    read_fields({"layers": 3}, {"layers": whole(1, 256), "bias": flag(False)}, "config.json: ")
    ->  {"layers": 3, "bias": False}
    read_fields({"layers": 2.5}, ...)  ->  FieldError: config.json: layers = 2.5, must be a whole number, 1 to 256
"""

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from blt_titan.data.prepare.json_lines import kind_of
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.model.attention import AttentionBackend
from blt_titan.model.hash_embedding import HASH_PRIMES
from blt_titan.model.initialization import DepthScaling
from blt_titan.patching.registry import is_registered, unregistered
from blt_titan.patching.rounding import Storage
from blt_titan.patching.rule import PatchRule

_LARGEST_JSON_BYTES = 64 * 1024**2
"""An index of a million tensors is as large."""
_REQUIRED: Any = object()


class FieldError(ValueError):
    """JSON that is not what it should be; the message names the field, what it is and what it may be."""


@dataclass(frozen=True)
class Field:
    """What a field may be."""

    holds: Callable[[Any], bool]
    what: str
    """In words."""
    default: Any = _REQUIRED
    """Where the field is missing."""
    null: bool = False
    """Whether it may be null."""
    inner: Any = None
    """The table of the fields of an object."""


def whole(low: int, high: int, default: Any = _REQUIRED, *, null: bool = False) -> Field:
    """Allow whole numbers from `low` to `high`."""
    # Neither true nor 2.0 is one.
    return Field(lambda v: type(v) is int and low <= v <= high, f"a whole number, {low} to {high}", default, null)


def number(low: float, high: float, default: Any = _REQUIRED, *, null: bool = False) -> Field:
    """Allow finite numbers from `low` to `high`."""
    return Field(
        lambda v: type(v) in (int, float) and low <= v <= high, f"a number, {low:g} to {high:g}", default, null
    )


def flag(default: Any = _REQUIRED, *, null: bool = False) -> Field:
    """Allow true and false."""
    return Field(lambda v: isinstance(v, bool), "true or false", default, null)


def text(default: Any = _REQUIRED, *, choices: Sequence[str] = (), null: bool = False) -> Field:
    """Allow a short text, one of `choices` if there are any."""
    what = f"one of {', '.join(choices)}" if choices else "a text"
    return Field(lambda v: isinstance(v, str) and (v in choices if choices else len(v) < 1000), what, default, null)


def wholes(low: int, high: int, most: int, default: Any = _REQUIRED, *, null: bool = False) -> Field:
    """Allow a list of 1 to `most` whole numbers."""
    what = f"a list of 1 to {most} whole numbers, {low} to {high}"
    return Field(
        lambda v: isinstance(v, list) and 1 <= len(v) <= most and all(type(n) is int and low <= n <= high for n in v),
        what,
        default,
        null,
    )


def section(table: Mapping[str, Field], default: Any = _REQUIRED, *, null: bool = False) -> Field:
    """Allow an object with the fields of a table."""
    return Field(lambda v: isinstance(v, Mapping), "an object", default, null, table)


def read_fields(content: Mapping[str, Any], table: Mapping[str, Field], where: str) -> dict[str, Any]:
    """Return all fields of a table, checked; missing ones have their default, others are left out.

    Args:
        content: an object of JSON.
        table: what is read of it.
        where: begins the names in messages.

    Raises:
        FieldError: naming the field.
    """
    found = {}
    for name, field in table.items():
        value = content.get(name, field.default)
        if value is _REQUIRED:
            raise FieldError(f"{where}{name} is missing; it must be {field.what}")
        if name not in content or (value is None and field.null):
            found[name] = value
        elif not field.holds(value):
            raise FieldError(f"{where}{name} = {reprlib.repr(value)}, must be {field.what}")
        elif field.inner is not None:
            inside: Any = value
            found[name] = read_fields(inside, field.inner, f"{where}{name}.")
        else:
            found[name] = value
    return found


def refuse_unknown(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse fields that are not known, where they would change what is computed.

    Raises:
        FieldError: naming one.
    """
    if unknown := sorted(content.keys() - set(known)):
        raise FieldError(f"{where}{unknown[0][:100]} is not known; known are {', '.join(known)}")


def parse_object(content: str | bytes, where: str) -> dict[str, Any]:
    """Parse an object of JSON.

    Raises:
        FieldError: it is none, is nested too deep, holds a key twice, or NaN or infinity, which are not JSON.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise FieldError(f"{where}: holds {next(key for key in keys if keys.count(key) > 1)[:100]!r} twice")
        return found

    def no_number(name: str) -> None:
        raise FieldError(f"{where}: holds {name}, which is no number of JSON")

    try:
        parsed = json.loads(content, object_pairs_hook=once, parse_constant=no_number)
    except FieldError:
        raise
    except RecursionError as error:
        raise FieldError(f"{where}: is nested too deep") from error
    except ValueError as error:
        raise FieldError(f"{where}: is not JSON ({str(error)[:200]})") from error
    if not isinstance(parsed, dict):
        raise FieldError(f"{where}: holds {kind_of(parsed)}, expected an object")
    return parsed


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds an object of JSON.

    Raises:
        FieldError: naming the file; as `parse_object`, or it is far too large.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > _LARGEST_JSON_BYTES:
        raise FieldError(f"{path}: is {size:,} bytes, more than {_LARGEST_JSON_BYTES:,}, expected a short object")
    return parse_object(path.read_bytes(), str(path))


WIDTH = partial(whole, 1, 2**17)
HEADS = partial(whole, 1, 2**12)
LAYERS = partial(whole, 1, 256)
BYTES = partial(whole, 1, 2**31)
"""Bytes of a patch."""
WINDOW = partial(whole, 1, 2**17)
"""Caches are as long."""
HASH_ROWS = partial(whole, 1, 2**32)
NGRAMS = partial(wholes, 1, 64, 64)
HASH_FUNCTIONS = partial(whole, 1, len(HASH_PRIMES))
THETA = partial(number, 1.0, 1e15)
NATS = partial(number, -1e6, 1e6)
RULE: Mapping[str, Field] = {
    "rule": text(),
    "threshold": NATS(None, null=True),
    "threshold_add": NATS(None, null=True),
    "stride": BYTES(None, null=True),
    "max_patch_bytes": BYTES(None, null=True),
    "storage": text(choices=get_args(Storage)),
}
_SEEDS = partial(whole, -(2**63), 2**64)
_ARGS: Mapping[type, Mapping[str, Field]] = {
    BLTArgs: {
        "local_dim": WIDTH(),
        "local_heads": HEADS(),
        "local_window": WINDOW(),
        "local_ffn_hidden": whole(0, 2**19),
        "encoder_layers": LAYERS(),
        "decoder_layers": LAYERS(),
        "global_dim": WIDTH(),
        "global_heads": HEADS(),
        "global_layers": LAYERS(),
        "global_ffn_hidden": whole(0, 2**19),
        "cross_attn_k": whole(1, 64),
        "cross_attn_heads": HEADS(),
        "encoder_cross_attn_all_layers": flag(),
        "decoder_cross_attn_all_layers": flag(),
        "hash_ngrams": NGRAMS(),
        "hash_functions": HASH_FUNCTIONS(),
        "hash_rows": HASH_ROWS(),
        "rope_theta": THETA(),
        "attention_backend": text(choices=get_args(AttentionBackend)),
        "init_depth_scaling": text(choices=get_args(DepthScaling)),
        "init_seed": _SEEDS(),
        "nominal_patch_bytes": number(1.0, 1e6),
    },
    EntropyModelArgs: {
        "dim": WIDTH(),
        "n_heads": HEADS(),
        "n_layers": LAYERS(),
        "ffn_hidden": whole(0, 2**19),
        "window": WINDOW(),
        "rope_theta": THETA(),
        "reset_at_newline": flag(),
        "attention_backend": text(choices=get_args(AttentionBackend)),
        "init_depth_scaling": text(choices=get_args(DepthScaling)),
        "init_seed": _SEEDS(),
    },
}


def read_args(kind: type, content: Mapping[str, Any], where: str) -> Any:
    """Make a model's arguments, `kind`, of an object that holds all of them and no other.

    Raises:
        FieldError: naming the field, or what makes no shape.
    """
    refuse_unknown(content, list(_ARGS[kind]), where)
    values = read_fields(content, _ARGS[kind], where)
    return valid_args(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}), where)


def valid_args(args: Any, where: str) -> Any:
    """Return a model's arguments if they make a shape.

    Raises:
        FieldError: naming what does not.
    """
    try:
        args.validate()
    except ValueError as error:
        raise FieldError(f"{where}{error}") from error
    if isinstance(args, BLTArgs) and list(args.hash_ngrams) != sorted(set(args.hash_ngrams)):
        raise FieldError(f"{where}hash_ngrams = {list(args.hash_ngrams)}, must be ascending lengths")
    return args


def read_rule(content: Any, where: str) -> PatchRule:
    """Make the rule by which patches begin of an object.

    Raises:
        FieldError: naming the field, or what the rule lacks.
    """
    if not isinstance(content, Mapping):
        raise FieldError(f"{where}: holds {reprlib.repr(content)}, expected an object")
    refuse_unknown(content, list(RULE), f"{where}.")
    if isinstance(name := content.get("rule"), str) and not is_registered(name):
        raise FieldError(f"{where}.rule = {reprlib.repr(name)}, {unregistered()}")
    return valid_rule(PatchRule(**read_fields(content, RULE, f"{where}.")), where)


def valid_rule(rule: PatchRule, where: str) -> PatchRule:
    """Return a rule if it can cut a text.

    Raises:
        FieldError: saying what it lacks, or holds in vain.
    """
    if faults := list(rule.faults()):
        raise FieldError(f"{where}: {'; '.join(faults)}")
    return rule
