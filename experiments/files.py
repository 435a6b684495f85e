"""Files that a reader, or a crash, finds whole: JSON written at once with its checksum, folders sealed by theirs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eval.releases import sha256

CHECKSUM = "checksum"
SEAL = "checksums.json"
REMEDY = ": delete it and run the cell again; only what this file says is computed anew"


class Damaged(ValueError):
    """A file of a cell is not as it was written: one sentence that names it and the way out."""


def write_json(file: Path, content: dict) -> None:
    """Write a JSON file so that a reader, or a crash, sees the old one or the new one and nothing between."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    plain = json.loads(json.dumps(content))
    try:
        with open(draft, "w") as stream:
            json.dump(plain | {CHECKSUM: checksum(plain)}, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def read_json(file: Path) -> dict | None:
    """A JSON file's content, None if there is no file. Damaged if it is not what was written."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{file} is not valid JSON ({error}){REMEDY}") from error
    if not isinstance(content, dict):
        raise Damaged(f"{file} holds no JSON object{REMEDY}")
    if content.pop(CHECKSUM, None) not in (None, checksum(content)):
        raise Damaged(f"{file} differs from its checksum{REMEDY}")
    return content


def checksum(content: dict) -> str:
    """SHA-256 of what a JSON file says, whatever its layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to that becomes `target` when the body has ended well, and nothing at all when it has not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    draft.chmod(0o755)
    try:
        yield draft
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the checksums of all files of `folder` beside them, last of all."""
    write_json(folder / SEAL, {f.name: sha256(f) for f in sorted(folder.iterdir()) if f.is_file() and f.name != SEAL})


def flaws(folder: Path) -> list[str]:
    """Names of the files of a sealed folder that are missing or not as they were sealed; SEAL itself if it is not
    there or broken."""
    try:
        sums = read_json(folder / SEAL)
    except Damaged:
        sums = None
    if sums is None:
        return [SEAL]
    return [name for name, s in sums.items() if not (folder / name).is_file() or sha256(folder / name) != s]


def disk_is_full(error: BaseException | None) -> bool:
    """Whether `error`, or what led to it, is a disk or a quota without space.

    safetensors and torch write by themselves and report it as errors of their own: the first by name, the second
    as a write that ended early.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in ("No space left on device", "PytorchStreamWriter failed", "os error 28")):
            return True
        error = error.__cause__ or error.__context__
    return False
