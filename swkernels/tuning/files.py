"""Write tuning files: whole or not at all, and without losing what others measured."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from swkernels import tuning
from swkernels.errors import InvalidInput

_KEY = ("op", "rows", "columns", "tokens")


def default_path(device_name: str) -> Path:
    """Return the file in the user's place where lookups for this device look.

    That is $SWKERNELS_TUNING itself if it names a file (one that is there, or a name that ends
    in .json), else a file named after the device in the user's directory.
    """
    place = Path(tuning.user_place()).expanduser()
    if place.is_file() or (place.suffix == ".json" and not place.is_dir()):
        return place
    return place / f"{_slug(device_name)}.json"


def check(path: Path, device_name: str, *, measured: bool) -> dict | None:
    """Return the content of the file that is to be extended, or None if there is none yet.

    Raises:
        InvalidInput: it cannot be written; or it is broken, for another device, or holds records
            of the other kind (a file says once for all whether they were measured on the device).
    """
    folder = next(each for each in path.absolute().parents if each.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InvalidInput(f"cannot write {path}: expected a file in a folder that can be written")
    if not path.exists():
        return None
    content = tuning.read(path)
    if content.get("device") != device_name:
        raise InvalidInput(
            f"{path} is the tuning file of {content.get('device') or 'any device'}, expected one "
            f"of {device_name}: give another file"
        )
    if bool(content.get("measured")) != measured:
        raise InvalidInput(
            f'{path} says "measured": {json.dumps(content.get("measured"))}, expected '
            f"{json.dumps(measured)}: give another file"
        )
    return content


def merge(
    path: Path,
    device_name: str,
    records: Sequence[Mapping],
    *,
    measured: bool,
    versions: Mapping[str, str | None],
) -> None:
    """Put `records` into the file at `path` and make lookups read it anew.

    Older records of the same operation, shape, bucket and dtypes are replaced, the others stay.
    Those that leave one of these open come last, so that they cannot hide a measured one. The
    file is written aside and renamed: a reader sees the old one or the new one.

    Args:
        path: of this device, or not there yet; folders are made.
        measured: whether the records were measured on the device.
        versions: of the packages that decide what a configuration is worth.

    Raises:
        InvalidInput: see `check`; or the file cannot be written.
    """
    before = check(path, device_name, measured=measured) or {}
    new = {_key(record) for record in records}
    kept = [record for record in before.get("records", ()) if _key(record) not in new]
    kept_open = [record for record in kept if _is_open(record)]
    kept = [record for record in kept if not _is_open(record)]
    head = {
        **before,
        "schema": tuning.SCHEMA,
        "device": device_name,
        "measured": measured,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": dict(versions),
    }
    head.pop("records", None)
    try:
        _replace(path, _text(head, [*kept, *records, *kept_open]))
    except OSError as error:
        raise InvalidInput(
            f"cannot write {path}: {error.strerror or error}; give another file"
        ) from error
    tuning.clear_cache()


def _key(record: Mapping) -> tuple:
    return (*(record.get(name) for name in _KEY), tuple(record.get("dtypes") or ()))


def _is_open(record: Mapping) -> bool:
    """Whether the record matches more than one key."""
    return None in _key(record) or len(record.get("dtypes") or ()) != 1


def _slug(device_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def _text(head: Mapping, records: Iterable[Mapping]) -> str:
    """JSON with one line for each record, so that a difference of two files can be read."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items()]
    body = ",\n".join(f"    {json.dumps(record)}" for record in records)
    return "{\n" + "".join(lines) + '  "records": [\n' + body + "\n  ]\n}\n"


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".aside")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
