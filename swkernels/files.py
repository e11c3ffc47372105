"""Files and folders that are whole or as they were, and files that others wrote: read with limits.

What is read with limits, and why, stands in docs/untrusted-files.md.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from swkernels.errors import InvalidInput

_LONGEST_INTEGER = 40  # digits: tokenizers have a model_max_length of 31
_LONGEST_FLOAT = 400
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Limits:
    """What a JSON text may cost before it is refused.

    Attributes:
        size: bytes of the text.
        depth: of lists and objects within each other.
        values: lists, objects, strings, numbers and constants in all; an object's key counts with
            its value.
    """

    size: int
    depth: int
    values: int


DOCUMENT = Limits(size=128 << 20, depth=32, values=8_000_000)  # reports, coordinates, manifests
CONFIG = Limits(size=16 << 20, depth=64, values=1_000_000)  # config.json and its like


def read_json(path: str | Path, *, limits: Limits = DOCUMENT, special: bool = False):
    """Read a JSON document that anyone may have written.

    Args:
        path: a regular file, or a link to one.
        limits: what it may cost.
        special: take NaN, Infinity and -Infinity, which are no JSON, and numbers that become
            infinite.

    Raises:
        InvalidInput: it is not there, no regular file, no JSON, or past a limit.
    """
    try:
        with open_regular(path) as file:
            data = file.read(limits.size + 1)
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path} as JSON: {error.strerror or error}; give a file that is there"
        ) from error
    return parse_json(data, path, limits=limits, special=special)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading; a pipe or a device, which might never end, is refused at once.

    Raises:
        InvalidInput: it is there and no regular file, or the path is none.
        OSError: it cannot be opened.
    """
    try:
        # A pipe without a writer would block already when it is opened.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in it
        raise InvalidInput(f"cannot read {str(path)!r:.300}: {error}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InvalidInput(f"cannot read {path}: expected a regular file, got a folder or a device")
    return os.fdopen(handle, "rb")


def parse_json(data: bytes, what: object, *, limits: Limits = DOCUMENT, special: bool = False):
    """Parse JSON that anyone may have written: UTF-8, no key twice, no number out of range.

    Size, depth and number of values are looked at before anything is built, in linear time.

    Args:
        data: the text.
        what: what it is, in messages.
        limits, special: as in ``read_json``.

    Raises:
        InvalidInput: no such JSON, or past a limit.
    """
    reason = _past(data, limits)
    if reason:
        raise InvalidInput(f"cannot read {what} as JSON: {reason}; take an undamaged copy")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=float if special else _float,
            parse_constant=None if special else _constant,
        )
        if _SURROGATE.search(data):  # half a character: cannot be printed or written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"cannot read {what} as JSON: {error}; take an undamaged copy"
        ) from error
    return value


def _past(data: bytes, limits: Limits) -> str | None:
    """Say which limit a text is past."""
    if len(data) > limits.size:
        return f"it has more than {limits.size} bytes"
    if data.startswith(b"\xef\xbb\xbf"):
        return "it begins with a byte order mark, expected plain UTF-8"
    # Without escapes every quote begins or ends a string. A backslash is never outside of one.
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    if plain.count(b'"') > 4 * limits.values:
        return f"it has more than {limits.values} values"
    outside = b"".join(plain.split(b'"')[::2])
    structure = outside.translate(None, _NOT_STRUCTURE)
    opened = structure.count(b"[") + structure.count(b"{")
    if opened + structure.count(b",") > limits.values:
        return f"it has more than {limits.values} values"
    if opened > limits.depth:
        steps = (1 if c in b"[{" else -1 for c in structure.translate(None, b","))
        if max(accumulate(steps)) > limits.depth:
            return f"lists and objects are nested deeper than {limits.depth}"
    return None


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"an object has the key {twice!r:.200} twice")
    return found


def _integer(text: str) -> int | float:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"a number has {len(text)} digits, expected at most {_LONGEST_INTEGER}")
    return int(text) if text != "-0" else -0.0  # no index or count is written so


def _float(text: str) -> float:
    value = float(text) if len(text) <= _LONGEST_FLOAT else math.inf
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file aside in its own folder and rename it, so that no half file is ever seen.

    Raises:
        InvalidInput: the folder is not there or cannot be written.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InvalidInput(
            f"cannot write {path}: {error.strerror or error}; give a path in a folder that is "
            "there and can be written"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except OSError as error:
        os.unlink(aside)
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        os.unlink(aside)
        raise


def in_folder(folder: Path, mark: str, write: Callable[[Path], None]) -> None:
    """Write a folder aside, beside its final place, and rename it: it is whole or as it was.

    Args:
        folder: made new with its parents, or replaced as a whole if it is empty or holds ``mark``.
        mark: a file that tells a folder of the kind that is written.
        write: called with an empty folder.

    Raises:
        InvalidInput: the folder holds something else; nothing is written.
        OSError: it cannot be made.
    """
    if folder.exists() and not (folder / mark).exists() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} is there and holds no {mark}: choose another folder")
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        made, before = work / "made", work / "before"
        try:
            made.mkdir()
            write(made)
            if folder.exists():
                os.replace(folder, before)
            try:
                os.replace(made, folder)
            except BaseException:
                if before.exists():
                    os.replace(before, folder)
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # something that is not ours lies in it
                parent.rmdir()
        raise
