"""The runs of a folder: one JSON line each, appended when it is done."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from swkernels.detect.report import encode
from swkernels.documents import (
    COUNT,
    MAGNITUDE,
    TEXT,
    Fields,
    ListOf,
    MapOf,
    Maybe,
    OneOf,
    check_document,
)
from swkernels.errors import InvalidInput
from swkernels.files import DOCUMENT, open_regular, parse_json

from .run import Run

RUNS = "runs.jsonl"
SCHEMA = "swkernels.study-run/1"
_LINE = Fields(
    {
        "schema": OneOf((SCHEMA,)),
        "run": TEXT,
        "kind": TEXT,
        "config": Fields({}),
        "model": TEXT,
        "identity": MapOf(TEXT),
        "device": TEXT,
        "threads": COUNT,
        "versions": MapOf(Maybe(TEXT)),
        "budget": TEXT,
        "seconds": MAGNITUDE,
        "figures": Fields({}),
    },
    {"seeds": ListOf(COUNT, 1), "task": TEXT},
)
# A line ends with a checksum of what stands before it. A figure that was changed is seen.
_SUM = re.compile(rb',"sum":"([0-9a-f]{16})"\}$')


class Book:
    """Records by the keys of their runs, in the order in which they were made.

    Args:
        path: a file of JSON lines; made by the first ``add``. A last line that was cut off does
            not count: its run is done again, and its line takes the place.
        identity: what the runs of a file have in common (model, data, dtype), by name.

    Raises:
        InvalidInput: a line that is no record, that was changed after it was written, or runs of
            another model or other data.
    """

    def __init__(self, path: Path, identity: dict[str, str] | None = None):
        self.path = path
        self._records: dict[str, dict] = {}
        text = b""
        if path.exists():
            with open_regular(path) as file:
                text = file.read(DOCUMENT.size + 1)
        if len(text) > DOCUMENT.size:
            raise InvalidInput(
                f"{path} has more than {DOCUMENT.size:,} bytes: give another folder with -o"
            )
        *lines, _ = text.split(b"\n")
        for number, line in enumerate(lines, 1):
            record = _record(line, f"{path}, line {number}")
            if identity is not None:
                _check_same(record["identity"], identity, f"{path}, line {number}")
            self._records[record["run"]] = record
        self._size = sum(len(line) + 1 for line in lines)  # bytes of whole lines

    def __contains__(self, run: Run) -> bool:
        return run.key in self._records

    def __iter__(self) -> Iterator[dict]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def figures(self, run: Run | str) -> dict:
        """What a run, or that of a key, found; KeyError where it has not been done."""
        return self._records[run if isinstance(run, str) else run.key]["figures"]

    def record(self, run: Run) -> dict:
        """Its whole line."""
        return self._records[run.key]

    def add(self, run: Run, about: dict, figures: dict) -> None:
        """Append a run that is done; it is on the disk when this returns.

        Args:
            about: the fields of a line that are not of the run itself.

        Raises:
            InvalidInput: it cannot be written; the lines before are as they were.
        """
        line = {"schema": SCHEMA, "run": run.key, "kind": run.kind, "config": dict(run.config)}
        record = encode(line | about | {"figures": figures})
        text = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
        data = text[:-1] + f',"sum":"{_sum(text)}"}}\n'.encode()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with os.fdopen(handle, "wb") as file:
                file.truncate(self._size)
                file.seek(self._size)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InvalidInput(f"cannot write {self.path}: {error.strerror or error}") from error
        self._size += len(data)
        self._records[run.key] = _decoded(json.loads(data))


def _record(line: bytes, where: str) -> dict:
    """The record of a line."""
    found = _SUM.search(line)
    if found and found[1].decode() != _sum(line[: found.start()] + b"}"):
        raise InvalidInput(
            f"{where} was changed after it was written: put back what it was, or delete the line, "
            "and its run is done again"
        )
    record = parse_json(line, where)
    check_document(record, _LINE, where)
    return _decoded(record)


def _sum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _decoded(value):
    """Undo ``encode``: JSON has no infinities."""
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _check_same(found: dict, wanted: dict, where: str) -> None:
    other = [name for name in wanted if name in found and found[name] != wanted[name]]
    if other:
        raise InvalidInput(
            f"{where}: a run with another {', '.join(other)} ({found[other[0]]}, now "
            f"{wanted[other[0]]}): give another folder with -o"
        )
