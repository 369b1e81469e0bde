"""Folders whose every file has a digest, so that a truncated, flipped or lost file is found before use."""

import hashlib
import json
import os
from pathlib import Path

from rlhf_jax.files import sync_folder, write_whole

SEAL = "digests.json"
"""A sealed folder's list: {"files": {path inside the folder: [bytes, sha256]}}."""


def seal(folder: Path) -> None:
    """Write the list of a folder's files, its last file; what is added later is not looked at."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / SEAL]
    found = {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files}
    write_whole(folder / SEAL, json.dumps({"files": found}, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, one line that begins with a path; None where every file is as it was sealed.

    A folder without its seal is wrong, too: whoever wrote it did not come to the end.
    """
    path = folder / SEAL
    try:
        listed = json.loads(path.read_bytes())["files"]
        files = {name: (size, digest) for name, (size, digest) in listed.items()}
    except FileNotFoundError:
        return f"{path if folder.is_dir() else folder} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{path} is no list of digests ({type(error).__name__}: {error})"
    return next((wrong for name, listed in files.items() if (wrong := _wrong(folder / name, *listed))), None)


def write_sealed(path: Path, content: bytes) -> None:
    """Write a file, and beside it `<name>.sha256`, as sha256sum does."""
    write_whole(path.with_name(f"{path.name}.sha256"), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
    write_whole(path, content)


def is_whole(path: Path) -> bool:
    """Whether a file is as `write_sealed` wrote it."""
    seal = path.with_name(f"{path.name}.sha256")
    return path.is_file() and seal.is_file() and seal.read_bytes().startswith(_digest(path).encode())


def set_aside(path: Path) -> Path:
    """Rename a file or folder to `<name>.damaged`, with a number where that is taken; returns where it is now."""
    places = [path.with_name(f"{path.name}.damaged{n}") for n in ("", *(f".{i}" for i in range(2, 1000)))]
    place = next(place for place in places if not place.exists())
    os.rename(path, place)
    sync_folder(path.parent)
    return place


def _wrong(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, not {size}"
    try:
        return None if _digest(path) == digest else f"{path} does not have the digest that it was written with"
    except OSError as error:  # a bad block
        return f"{path} cannot be read ({error.strerror})"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
