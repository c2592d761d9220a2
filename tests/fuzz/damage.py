"""Damage to files that a program reads back: what disks, kills, editors, strangers and mistakes leave."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from blt_titan.data.store.manifest import MANIFEST_NAME
from tests.fuzz.draw import Draw

ATTACK_FILE = "EXECUTED"
"""What a pickle that is executed creates in the folder of the case."""


def damage(draw: Draw, root: Path, *, attack_at: Path | None = None) -> str:
    """Change one thing below a folder, or the folder itself; say what."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    if not files or draw.chance(0.03):
        return _damage_place(draw, root, root)
    if attack_at is not None and draw.chance(0.05):
        return _plant(draw, root, attack_at / ATTACK_FILE)
    if (root / MANIFEST_NAME).is_file() and draw.chance(0.25):
        return _lie(draw, root)
    # Small files say what the large ones are, and there are fewer of them.
    named = [path for path in files if path.suffix in (".json", ".npy") or path.name == ".metadata"]
    path = draw.choice(named if named and draw.chance(0.5) else files)
    name = path.relative_to(root.parent).as_posix()
    if attack_at is not None and path.suffix in ("", ".distcp", ".pth", ".bin", ".pt") and draw.chance(0.3):
        path.write_bytes(_attack(attack_at / ATTACK_FILE))
        return f"{name}: a pickle that writes {ATTACK_FILE}"
    if path.suffix in (".json", ".jsonl") and draw.chance(0.6):
        return f"{name}: {_damage_json(draw, path)}"
    if path.suffix == ".safetensors" and draw.chance(0.5):
        return f"{name}: {_damage_safetensors_header(draw, path)}"
    if draw.chance(0.15):
        return _damage_place(draw, path, root)
    if draw.chance(0.15) and len(files) > 1:
        other = draw.choice([file for file in files if file != path])
        return f"{name}: {_swap(draw, path, other)} {other.relative_to(root.parent).as_posix()}"
    content = path.read_bytes()
    damaged, what = _damage_bytes(draw, content)
    path.write_bytes(damaged)
    return f"{name}: {what}"


def _damage_bytes(draw: Draw, content: bytes) -> tuple[bytes, str]:
    place = draw.randint(0, len(content))
    size = draw.choice([1, 2, 8, 64, 512])
    return draw.choice(
        [
            (content[:place], f"cut at {place}"),
            (content[:place] + bytes(len(content) - place), f"NUL from {place} on"),
            (content + bytes(size), f"{size} NUL appended"),
            (content[place:], f"begins at {place}"),
            (b"", "emptied"),
            (bytes(len(content)), "all NUL"),
            (content + content, "appended to itself"),
            (content[:place] + draw.randbytes(size) + content[place + size :], f"{size} random bytes at {place}"),
            (content[:place] + b"\xff" * size + content[place + size :], f"{size} bytes 255 at {place}"),
            (content[:place] + content[place + size :], f"{size} bytes missing at {place}"),
            (draw.randbytes(size), f"{size} random bytes"),
            (b"\xef\xbb\xbf" + content, "a byte order mark before"),
            (content.replace(b"\n", b"\r\n"), "line ends CR LF"),
            (content.decode("latin-1").encode("utf-16"), "UTF-16"),
        ]
    )


def _damage_place(draw: Draw, path: Path, root: Path) -> str:
    """Put another kind of thing where a file or folder is."""
    what = draw.choice(["removed", "a folder", "a dangling link", "a link to itself", "renamed", "read-only", "a file"])
    name = path.relative_to(root.parent).as_posix()
    if not path.exists():
        return f"{name}: as it is"
    if what == "renamed":
        path.rename(path.with_name(f"{path.name}.bak"))
    elif what == "read-only":
        path.chmod(0o400 if path.is_file() else 0o500)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if what == "a folder":
            path.mkdir()
        elif what == "a file":
            path.write_bytes(b"x")
        elif what == "a dangling link":
            path.symlink_to("nowhere")
        elif what == "a link to itself":
            path.symlink_to(path.name)
    return f"{name}: {what}"


def _swap(draw: Draw, path: Path, other: Path) -> str:
    content, other_content = path.read_bytes(), other.read_bytes()
    path.write_bytes(other_content)
    if draw.chance(0.5):
        other.write_bytes(content)
        return "exchanged with"
    return "has the content of"


def _damage_json(draw: Draw, path: Path) -> str:
    written = path.read_text(encoding="utf-8", errors="replace")
    lines = written.split("\n") if path.suffix == ".jsonl" else [written]
    number = draw.randrange(len(lines))
    try:
        content = json.loads(lines[number])
    except ValueError:
        content = {}
    changed, what = damage_value(draw, content)
    try:
        written = json.dumps(changed, indent=None if path.suffix == ".jsonl" else 2)
    except (RecursionError, ValueError):
        written = "[" * 100_000
    lines[number] = written
    path.write_text("\n".join(lines), encoding="utf-8")
    return what + (f" in line {number + 1}" if path.suffix == ".jsonl" else "")


def damage_value(draw: Draw, content: Any) -> tuple[Any, str]:
    """Replace, remove or add one value somewhere in JSON content; return it and say what was done."""
    if not isinstance(content, dict | list) or not content or draw.chance(0.05):
        value = draw.json_value()
        return value, f"= {_shown(value)}"
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = draw.choice(keys)
    what = draw.choices(["deeper", "replaced", "removed", "added", "near"], [5, 4, 1, 1, 2])[0]
    said: str
    if what == "deeper":
        content[key], said = damage_value(draw, content[key])
        return content, f"[{key!r}]{said}"
    if what == "removed":
        del content[key]
        return content, f"[{key!r}] removed"
    if what == "near" and isinstance(content[key], int | float) and not isinstance(content[key], bool):
        value = content[key] + draw.choice([1, -1, 0.5, 10**6, -(10**6)])
    elif what == "near" and isinstance(content[key], str):
        value = content[key] + draw.choice(["x", "/", "\0", " "])
    else:
        value = draw.json_value()
    if what == "added":
        key = draw.choice(["x", "", "args", "__class__"]) if isinstance(content, dict) else key
    content[key] = value
    return content, f"[{key!r}] = {_shown(value)}"


def _shown(value: Any) -> str:
    try:
        return repr(value)[:60]
    except (RecursionError, ValueError):
        return "something deep or long"


def _damage_safetensors_header(draw: Draw, path: Path) -> str:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, what = damage_value(draw, json.loads(content[8 : 8 + size]))
    try:
        written = json.dumps(header).encode()
    except (RecursionError, ValueError):
        written = b"[" * 10_000
    claimed = draw.choice([len(written)] * 4 + [0, 2**63, len(content) * 2])
    path.write_bytes(struct.pack("<Q", claimed) + written + content[8 + size :])
    return f"header: {what}"


def _lie(draw: Draw, root: Path) -> str:
    """Change a record batch of byte shards, and every checksum of it, so that all agree."""
    try:
        manifest = json.loads((root / MANIFEST_NAME).read_bytes())
        entry = draw.choice([entry for split in manifest["splits"].values() for entry in split])
        shard = bytearray((root / entry["file"]).read_bytes())
        index = np.load(root / entry["index_file"])
        number = draw.randrange(len(index))
        offset, length, *_ = index[number].tolist()
        place = offset + draw.randrange(0, length, 4)
        value = draw.choice([0, 1, -1, 2**31 - 1, -(2**31), draw.randrange(2000), draw.randrange(-(2**31), 2**31)])
        struct.pack_into("<i", shard, place, value)
        index[number, -1] = zlib.crc32(shard[offset : offset + length])
        np.save(root / entry["index_file"], index)
        entry["index_sha256"] = hashlib.sha256((root / entry["index_file"]).read_bytes()).hexdigest()
    except (KeyError, TypeError, ValueError, IndexError, OSError, EOFError, AttributeError, struct.error):
        return "its shards are damaged already"
    (root / entry["file"]).write_bytes(shard)
    (root / MANIFEST_NAME).write_text(json.dumps(manifest))
    return f"{entry['file']}: {value} at byte {place - offset} of record batch {number}, with right checksums"


def _plant(draw: Draw, root: Path, created: Path) -> str:
    """Add a file that runs code if it is loaded as other programs load it."""
    name = draw.choice(
        [".metadata", "pytorch_model.bin", "consolidated.pth", "model.pt", "modeling_blt.py", "__0_0.distcp"]
    )
    path = root / name
    if name.endswith(".py"):
        path.write_text(f"import os\nos.mkdir({str(created)!r})\n")
    else:
        path.write_bytes(_attack(created))
    return f"{root.name}/{name}: added, it writes {ATTACK_FILE}"


class _Attack:
    def __init__(self, path: str):
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


def _attack(path: Path) -> bytes:
    return pickle.dumps({"state_dict_metadata": _Attack(str(path)), "x": _Attack(str(path))})
