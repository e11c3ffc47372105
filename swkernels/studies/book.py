"""The runs of a folder: one JSON line each, appended when it is done."""

from __future__ import annotations

import json
import os
from pathlib import Path

from swkernels.detect.report import encode
from swkernels.documents import NUMBER, TEXT, Fields, MapOf, OneOf, check_document
from swkernels.errors import InvalidInput
from swkernels.files import DOCUMENT, open_regular, parse_json, write_atomically

from .run import Run

SCHEMA = "swkernels.study-run/1"
_LINE = Fields(
    {
        "schema": OneOf((SCHEMA,)),
        "run": TEXT,
        "kind": TEXT,
        "config": Fields({}),
        "identity": MapOf(TEXT),
        "seconds": NUMBER,
        "figures": Fields({}),
    }
)


class Book:
    """Records by the keys of their runs.

    Args:
        path: a file of JSON lines; made by the first ``add``. A last line that was cut off is
            dropped: its run is done again.
        identity: what the runs of a file have in common (model, data, dtype), by name.

    Raises:
        InvalidInput: a line that is no record, or runs of another model or other data.
    """

    def __init__(self, path: Path, identity: dict[str, str] | None = None):
        self.path = path
        self._records: dict[str, dict] = {}
        text = b""
        if path.exists():
            with open_regular(path) as file:
                text = file.read(DOCUMENT.size + 1)
        whole, _, rest = text.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            where = f"{path}, line {number}"
            record = parse_json(line, where)
            check_document(record, _LINE, where)
            if identity is not None:
                _check_same(record["identity"], identity, where)
            self._records[record["run"]] = _decoded(record)
        if rest:
            write_atomically(path, whole + b"\n" if whole else b"")

    def __contains__(self, run: Run) -> bool:
        return run.key in self._records

    def figures(self, run: Run | str) -> dict:
        """What a run, or that of a key, found; KeyError where it has not been done."""
        return self._records[run if isinstance(run, str) else run.key]["figures"]

    def record(self, run: Run) -> dict:
        """Its whole line."""
        return self._records[run.key]

    def add(self, run: Run, about: dict, figures: dict) -> None:
        """Append a run that is done; it is on the disk when this returns.

        Args:
            about: ``identity``, ``seconds`` and whatever else the line should say.
        """
        line = {"schema": SCHEMA, "run": run.key, "kind": run.kind, "config": dict(run.config)}
        record = encode(line | about | {"figures": figures})
        data = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        try:
            with self.path.open("ab") as file:
                file.write(data.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InvalidInput(f"cannot write {self.path}: {error.strerror or error}") from error
        self._records[run.key] = _decoded(json.loads(data))


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
