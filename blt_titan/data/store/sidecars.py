"""Entropy sidecars: one value for each byte of text, in files beside the shards.

In: the entropies of a record batch, H[i] in nats after byte i of its text. Out: for each shard `train-00000.arrow` a
file of the same name in `entropies/NAME/`, whose record batches are those of the shard, and an index beside it. Any
number of entropy models can score the same text; a run names one.

    data/web/                    text, written once
      manifest.json  train-00000.arrow  train-00000.index.npy
      entropies/default/         one model's entropies
        sidecar.json  train-00000.arrow  train-00000.index.npy

Position 0 of a document (BOS) has no value: no rule asks for it, since position 1 always starts a patch. EOS has none
either: nothing follows.

A record batch of a sidecar carries the crc of the text's record batch, so that a swap of files shows at once, and its
own raw bytes are checked before they are believed, as those of shards are. A sidecar directory is complete when it has
`sidecar.json`, which is written last, from the entries `NAME.done.json` of the shards. Those stay: scoring goes on with
the shards that have none, or one that no longer fits, and ranks need no other word from each other.
"""

import contextlib
import hashlib
import io
import json
import os
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from blt_titan.data.store.address import Address, Place, place_of
from blt_titan.data.store.arrow_file import map_file, parse_index
from blt_titan.data.store.atomic_file import write_atomically
from blt_titan.data.store.entropy_batch import check_entropies, entropies_schema, parse_entropies
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.folder import Content
from blt_titan.data.store.manifest import SPLITS, ShardEntry, check_file_name, check_whole_number, read_manifest
from blt_titan.data.store.names import plain_name
from blt_titan.data.store.shards import RecordBatch, ShardSet
from blt_titan.patching.rounding import Storage, to_storage

FORMAT, VERSION = "blt_titan.entropies", 1
SIDECAR_NAME = "sidecar.json"
DIRECTORY = "entropies"
INDEX_COLUMNS = ("offset", "length", "values", "text_crc32", "crc32")

_SETTINGS_NAME = "settings.json"
_DONE_SUFFIX = ".done.json"
_TEMPORARY_SUFFIX = ".tmp"


class SidecarSettings(NamedTuple):
    """What a sidecar was made with; compared with what a run wants."""

    storage: Storage
    model: dict[str, Any]
    """The entropy model's arguments, `reset_at_newline` among them."""
    weights_sha256: str
    """Digest of all its parameters."""
    compute_dtype: str
    """float32 or bfloat16."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One finished file of a sidecar."""

    file: str
    index_file: str
    index_sha256: str
    file_bytes: int
    record_batches: int
    text_index_sha256: str

    def __post_init__(self):
        for key in ("file", "index_file"):
            check_file_name(key, getattr(self, key))
        for key in ("file_bytes", "record_batches"):
            check_whole_number(key, getattr(self, key), minimum=1)


def fingerprint_of(settings: SidecarSettings) -> str:
    """Identify what decides about entropies, the same for a sidecar and for the model that scores while training."""
    return hashlib.sha256(json.dumps([settings.storage, settings.model, settings.weights_sha256]).encode()).hexdigest()


def sidecar_directory(data: str | os.PathLike[str], name: str) -> Path:
    """Return where the sidecar `name` of a data set of this machine lies.

    Raises:
        DataError: the name would lead elsewhere, or the data lies in an object store.
    """
    if isinstance(place := place_of(data), Address):
        raise DataError(
            f"{place}: entropies are written beside the shards, and not into an object store: copy the data set here, "
            f"score it, and copy its folder {DIRECTORY} there"
        )
    return place / DIRECTORY / plain_name(name)


class SidecarWriter:
    """Write the entropies of one shard; record batches may come in any order.

    Nothing has its final name before `finish`, so an interrupted shard leaves only temporary files.
    """

    def __init__(self, directory: Path, shard: ShardEntry, storage: Storage):
        self._directory, self._shard = directory, shard
        self._storage: Storage = storage
        directory.mkdir(parents=True, exist_ok=True)
        self._temporary = directory / f"{shard.file}.{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}"
        self._file = open(self._temporary, "wb")  # noqa: SIM115
        self._schema = entropies_schema(storage)
        self._arrow: Any = pa.ipc.new_file(self._file, self._schema)
        self._index = np.full((shard.record_batches, len(INDEX_COLUMNS)), -1, np.int64)

    def add(self, batch_in_shard: int, entropies_nats: np.ndarray, text_crc32: int) -> None:
        """Append one record batch's entropies, fp32 [text bytes].

        Raises:
            DataError: they are not finite, or negative.
        """
        assert self._index[batch_in_shard, 0] < 0, "added twice"
        try:
            check_entropies(entropies_nats)
        except ValueError as error:
            raise DataError(
                f"{self._directory / self._shard.file}: record batch {batch_in_shard}: the entropy model gave values "
                f"that are none ({error}): its weights are damaged, or --dtype is too small for it"
            ) from error
        stored = to_storage(entropies_nats, self._storage)
        batch = pa.record_batch([pa.array(stored)], schema=self._schema)
        message = batch.serialize()
        self._arrow.write_batch(batch)
        offset = self._file.tell() - message.size
        self._index[batch_in_shard] = (offset, message.size, len(stored), text_crc32, zlib.crc32(message))

    def finish(self) -> None:
        """Give the file its name, and say that it is done."""
        assert (self._index[:, 0] >= 0).all(), "record batches are missing"
        self._arrow.close()
        file_bytes = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        content = io.BytesIO()
        np.save(content, self._index, allow_pickle=False)
        entry = _Entry(
            file=self._shard.file,
            index_file=self._shard.index_file,
            index_sha256=hashlib.sha256(content.getbuffer()).hexdigest(),
            file_bytes=file_bytes,
            record_batches=len(self._index),
            text_index_sha256=self._shard.index_sha256,
        )
        write_atomically(self._directory / entry.index_file, content.getvalue())
        try:
            os.replace(self._temporary, self._directory / entry.file)
        except FileNotFoundError:
            # Another launch scored the same shard and completed the sidecar meanwhile.
            if not is_done(self._directory, self._shard):
                raise
            return
        write_atomically(self._directory / f"{entry.file}{_DONE_SUFFIX}", json.dumps(asdict(entry)).encode())

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def is_done(directory: Path, shard: ShardEntry, *, verify: Storage | None = None) -> bool:
    """Tell whether a shard's entropies are finished and sound; False where they are of another text.

    Args:
        directory: of the sidecar.
        shard: of the text.
        verify: also check every record batch, of entropies stored like this; reads the whole file.
    """
    try:
        entry = _Entry(**json.loads((directory / f"{shard.file}{_DONE_SUFFIX}").read_bytes()))
        index_bytes = (directory / entry.index_file).read_bytes()
        sound = (
            entry.text_index_sha256 == shard.index_sha256
            and (directory / entry.file).stat().st_size == entry.file_bytes
            and hashlib.sha256(index_bytes).hexdigest() == entry.index_sha256
        )
        if not sound or verify is None:
            return sound
        content, shape = map_file(directory / entry.file), (shard.record_batches, len(INDEX_COLUMNS))
        for offset, length, values, _, crc32 in parse_index(index_bytes, shape, content.size).tolist():
            parse_entropies(content.slice(offset, length), values, verify, crc32)
        return True
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def begin_sidecar(data: str | os.PathLike[str], name: str, settings: SidecarSettings) -> None:
    """Make a sidecar's directory, or check that what is there was made with the same settings.

    Raises:
        DataError: it was made with other settings.
    """
    directory = sidecar_directory(data, name)
    directory.mkdir(parents=True, exist_ok=True)
    wanted = settings._asdict()
    for known in (_SETTINGS_NAME, SIDECAR_NAME):
        try:
            recorded = json.loads((directory / known).read_bytes())["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it is not there, or damaged and will be written anew
        if differing := [key for key in wanted if recorded.get(key) != wanted[key]]:
            raise DataError(
                f"{directory}: made with another {', '.join(differing)}; choose another --name, or remove it"
            )
        return
    write_atomically(directory / _SETTINGS_NAME, json.dumps({"settings": wanted}).encode())


def withdraw_sidecar(data: str | os.PathLike[str], name: str) -> None:
    """Say that a sidecar is no longer complete: some of its shards must be scored again."""
    (sidecar_directory(data, name) / SIDECAR_NAME).unlink(missing_ok=True)


def complete_sidecar(data: str | os.PathLike[str], name: str, settings: SidecarSettings) -> bool:
    """Write `sidecar.json` if every shard is done; whoever finishes last does. Returns whether it is complete."""
    directory = sidecar_directory(data, name)
    shards = [shard for split in SPLITS for shard in read_manifest(data).splits[split]]
    if not all(is_done(directory, shard) for shard in shards):
        return False
    entries = [json.loads((directory / f"{shard.file}{_DONE_SUFFIX}").read_bytes()) for shard in shards]
    content = {"format": FORMAT, "version": VERSION, "settings": settings._asdict(), "shards": entries}
    written = (json.dumps(content, indent=2) + "\n").encode()
    path = directory / SIDECAR_NAME
    if not path.exists() or path.read_bytes() != written:
        write_atomically(path, written)
    # What killed ranks left of shards.
    for left in directory.glob(f"*.arrow.{'?' * 32}{_TEMPORARY_SUFFIX}"):
        left.unlink(missing_ok=True)
    return True


class _OpenSidecar(NamedTuple):
    path: Place
    content: Content
    index: np.ndarray


class EntropySidecar:
    """Read the entropies of one split's record batches, by number.

    It pickles, as `ShardSet` does: a worker opens its own files.

    Raises:
        DataError: the sidecar is missing, incomplete, or of another text; names it.
    """

    def __init__(self, data: str | os.PathLike[str], name: str, shards: ShardSet, *, max_open_shards: int = 64):
        self._folder = shards.folder / DIRECTORY / plain_name(name)
        self.directory = self._folder.place
        path = self.directory / SIDECAR_NAME
        try:
            content = json.loads(self._folder.read(SIDECAR_NAME))
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such file, so there are no complete entropies {name!r}; make them, or let scoring finish, "
                f"with `blt-titan score --data {data} --name {name} --checkpoint ...`"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read ({error}); score the data again") from error
        found = (content.get("format"), content.get("version")) if isinstance(content, dict) else (None, None)
        if found != (FORMAT, VERSION):
            raise DataError(f"{path}: format {found[0]!r} version {found[1]!r} is unknown; score the data again")
        try:
            self.settings = SidecarSettings(**content["settings"])
            if self.settings.storage not in get_args(Storage):
                raise ValueError(f"storage {self.settings.storage!r}")
            if not isinstance(self.settings.model, dict):
                raise TypeError(f"model must be an object, got {self.settings.model!r}")
            self._entries = {entry.file: entry for entry in (_Entry(**entry) for entry in content["shards"])}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: malformed ({error!r}); score the data again") from error
        self._max_open_shards = max_open_shards
        self._open: OrderedDict[str, _OpenSidecar] = OrderedDict()
        for shard in shards.entries:
            self._check_entry(shard)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __call__(self, batch: RecordBatch) -> np.ndarray:
        """Check and read the entropies of a record batch: fp32 [text bytes], rounded as they were stored.

        Raises:
            DataError: damaged, or of another text; names file and record batch.
        """
        opened = self._opened(batch.shard_path.name)
        where = f"{opened.path}: record batch {batch.batch_in_shard}"
        if batch.batch_in_shard >= len(opened.index):
            raise DataError(f"{where}: there are only {len(opened.index)}; restore the file, or score the data again")
        offset, length, values, of_text, crc32 = opened.index[batch.batch_in_shard].tolist()
        if (values, of_text) != (len(batch.text), batch.crc32):
            raise DataError(
                f"{where}: belongs to {values} bytes of text with crc32 {of_text:08x}, the shard has {len(batch.text)} "
                f"with {batch.crc32:08x}; files were swapped: restore them, or score the data again"
            )
        try:
            message = opened.content.message(offset, length, crc32)
            return parse_entropies(message, values, self.settings.storage, crc32)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(
                f"{where}: {error}: the file is damaged; restore it, or score the data again with --verify"
            ) from error

    def verify_structure(self) -> None:
        """Check every file's size and index now; reads no entropies."""
        for name in self._entries:
            self._load(name)

    def _check_entry(self, shard: ShardEntry) -> None:
        entry = self._entries.get(shard.file)
        if entry is None or entry.text_index_sha256 != shard.index_sha256:
            raise DataError(
                f"{self.directory / SIDECAR_NAME}: {shard.file} has {'no entry' if entry is None else 'other text'}; "
                "the data was prepared again since: score it again"
            )
        self._check_file(entry)

    def _check_file(self, entry: _Entry) -> None:
        path = self.directory / entry.file
        try:
            found = self._folder.size(entry.file)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}, but {SIDECAR_NAME} names it; score the data again") from error
        if found != entry.file_bytes:
            raise DataError(
                f"{path}: {found} bytes, {SIDECAR_NAME} says {entry.file_bytes}; restore it, or score the data again"
            )

    def _opened(self, name: str) -> _OpenSidecar:
        opened = self._open.get(name)
        if opened is None:
            opened = self._open[name] = self._load(name)
            if len(self._open) > self._max_open_shards:
                self._open.popitem(last=False)
        else:
            with contextlib.suppress(KeyError):  # another thread may have closed it meanwhile
                self._open.move_to_end(name)
        return opened

    def _load(self, name: str) -> _OpenSidecar:
        entry = self._entries[name]
        self._check_file(entry)
        path, index_path = self.directory / entry.file, self.directory / entry.index_file
        try:
            content = self._folder.open(entry.file)
            index_bytes = self._folder.read_index(entry.index_file, entry.index_sha256)
        except OSError as error:
            raise DataError(f"{path}: it or its index cannot be read ({error}); check permissions") from error
        if hashlib.sha256(index_bytes).hexdigest() != entry.index_sha256:
            raise DataError(f"{index_path}: does not match its digest in {SIDECAR_NAME}; score the data again")
        try:
            index = parse_index(index_bytes, (entry.record_batches, len(INDEX_COLUMNS)), content.size)
        except ValueError as error:
            raise DataError(f"{index_path}: does not fit its shard ({error}); score the data again") from error
        return _OpenSidecar(path, content, index)


class EntropySidecars:
    """The sidecars of several data sets; each record batch is looked up in that of its own directory."""

    def __init__(self, sidecars: Sequence[EntropySidecar]):
        self._of_directory = {sidecar.directory.parent.parent: sidecar for sidecar in sidecars}
        self.fingerprint = fingerprint_of(sidecars[0].settings)
        """Digest of the model, the storage and the precision; of the first sidecar, if there are several."""
        self.storage: Storage = sidecars[0].settings.storage

    def __call__(self, batch: RecordBatch) -> np.ndarray:
        """Check and read the entropies of a record batch, as `EntropySidecar` does."""
        return self._of_directory[batch.shard_path.parent](batch)
