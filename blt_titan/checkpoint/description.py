"""What model a checkpoint holds: one value, written into every checkpoint as JSON with a version.

    {"version": 1, "name": "blt", "args": {"local_dim": 96, ...}, "patching": {"rule": "space", ...}, "entropies": ""}

The one policy for what is not as expected: another version, a field that is missing, one that is not known, and a value
out of its bounds are refused by name. What a later version means by a description it says by its number; nothing is
guessed. So a new argument of a model is a new version.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from blt_titan.checkpoint.json_fields import (
    FieldError,
    parse_object,
    read_args,
    read_fields,
    read_rule,
    refuse_unknown,
    text,
)
from blt_titan.checkpoint.read import CheckpointError
from blt_titan.model.args import BLTArgs, EntropyModelArgs
from blt_titan.patching.rule import PatchRule

VERSION = 1
MODEL_KEY = "train_state.model"
"""The entry of a checkpoint that holds the description."""
MODEL_KINDS: Mapping[str, type] = {"blt": BLTArgs, "blt_entropy": EntropyModelArgs}
_FIELDS = ("version", "name", "args", "patching", "entropies")


class Difference(NamedTuple):
    """In what the models of two descriptions differ."""

    field: str
    """`name`, or an argument."""
    saved: Any
    """As the checkpoint says it."""
    own: Any
    """As the run says it."""

    def __str__(self) -> str:
        if self.field == "name":
            return f"is of a model {self.saved!r}"
        return f"is of a model with {self.field} = {_plain(self.saved)!r}, this run has {_plain(self.own)!r}"


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its model."""

    name: str
    """As `model.name` in a TOML."""
    args: Any
    """BLTArgs or EntropyModelArgs."""
    rule: PatchRule | None = None
    """Where its patches begin, if that is known."""
    entropies: str = ""
    """The fingerprint of the entropy model that its training text was cut with, if that is known."""

    def to_json(self) -> str:
        """Return it as a checkpoint holds it."""
        return json.dumps(
            {
                "version": VERSION,
                "name": self.name,
                "args": stored(self.args),
                "patching": None if self.rule is None else self.rule.as_dict(),
                "entropies": self.entropies,
            }
        )

    @classmethod
    def from_json(cls, content: Any, where: str) -> "Description":
        """Read and check what a checkpoint holds.

        Args:
            content: a text, if it is what `to_json` wrote.
            where: begins the message of an error.

        Raises:
            CheckpointError: naming the field that is not what it should be.
        """
        if not isinstance(content, str):
            raise CheckpointError(f"{where}: holds {type(content).__name__}, expected a text")
        try:
            return cls(**_read(parse_object(content, where), where))
        except FieldError as error:
            raise CheckpointError(str(error)) from error

    def difference(self, own: "Description") -> Difference | None:
        """Return the first thing that makes another model of it, in weights or in what is computed with them.

        The rule of the patches is the data's matter: a run may change it.

        Args:
            own: what the run that reads it says.
        """
        if self.name != own.name:
            return Difference("name", self.name, own.name)
        saved, wanted = identity(self.args), identity(own.args)
        return next((Difference(key, saved[key], wanted[key]) for key in wanted if saved[key] != wanted[key]), None)


def stored(args: BLTArgs | EntropyModelArgs) -> dict[str, Any]:
    """Return the arguments that a checkpoint holds: all but those marked `stored: False` (model/args.py)."""
    alone = {field.name for field in fields(args) if not field.metadata.get("stored", True)}
    return {name: value for name, value in asdict(args).items() if name not in alone}


def identity(args: BLTArgs | EntropyModelArgs) -> dict[str, Any]:
    """Return the arguments that make the model what it is: all but those marked `identity: False` (model/args.py)."""
    return {field.name: getattr(args, field.name) for field in fields(args) if field.metadata.get("identity", True)}


def _read(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    # First: what another version means by its other fields is not known here.
    if (version := content.get("version")) != VERSION or isinstance(version, bool):
        said = "no version" if version is None else f"version {str(version)[:20]}"
        raise FieldError(
            f"{where}: says {said} of what a checkpoint holds, this release reads version {VERSION} alone; read it "
            "with the release that wrote it"
        )
    refuse_unknown(content, _FIELDS, f"{where}: ")
    found = read_fields(content, {"name": text(), "entropies": text()}, f"{where}: ")
    if (kind := MODEL_KINDS.get(found["name"])) is None:
        raise FieldError(f"{where}: holds a model {found['name']!r}, not one of {', '.join(MODEL_KINDS)}")
    args = content.get("args")
    if not isinstance(args, Mapping):
        raise FieldError(f"{where}: args is no object")
    if "patching" not in content:
        raise FieldError(f"{where}: patching is missing; it must be an object, or null")
    patching = content["patching"]
    rule = None if patching is None else read_rule(patching, f"{where}: patching")
    if missing := [field.name for field in fields(PatchRule) if patching is not None and field.name not in patching]:
        raise FieldError(f"{where}: patching.{missing[0]} is missing")
    # How the run attended that wrote it, on its devices: whoever reads it has others.
    read = replace(read_args(kind, args, f"{where}: args."), attention_backend="auto")
    return found | {"args": read, "rule": rule}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
