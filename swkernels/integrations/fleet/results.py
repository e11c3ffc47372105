"""What came of each checkpoint: a file that grows by a line a result, and a table."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
from pathlib import Path

from swkernels.errors import InvalidInput
from swkernels.files import DOCUMENT, parse_json, write_atomically

from .work import DONE

LINES, TABLE = "fleet.jsonl", "fleet.csv"
COLUMNS = (
    "name model status seconds attempts parameters super_weights summary error".split()  # of TABLE
)


class Results:
    """The results of a folder, those of earlier runs included; one process at a time writes them.

    Every result is one line that is written and flushed to the disk at once: a kill loses at most
    the line in progress, which the next run removes.

    Args:
        folder: made where it is not there.

    Raises:
        InvalidInput: it cannot be written, another process is at it, or fleet.jsonl is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: dict[str, dict] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / LINES, "a+b")
        except OSError as error:
            raise InvalidInput(
                f"cannot write into {folder}: {error.strerror or error}; give another --output"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError as error:
            self._file.close()
            raise InvalidInput(
                f"another scan-many writes into {folder}: wait for it, or give another --output"
            ) from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def done(self, name: str, key: str) -> bool:
        """Whether there is a report of a checkpoint with these files and settings."""
        row = self.rows.get(name)
        return (
            row is not None
            and row["status"] == DONE
            and row["key"] == key
            and (self.folder / name / "report.json").is_file()
        )

    def add(self, row: dict) -> None:
        """Keep one result, on the disk when this returns."""
        self.rows[row["name"]] = row
        self._file.write(json.dumps(row, ensure_ascii=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def write_table(self, names: list[str]) -> Path:
        """Write fleet.csv, a row for each of these names that has a result."""
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for name in names:
            if name in self.rows:
                row = self.rows[name]
                table.writerow(row | {"super_weights": places(row)})
        path = self.folder / TABLE
        write_atomically(path, text.getvalue())
        return path

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read(DOCUMENT.size + 1)
        if len(data) > DOCUMENT.size:
            raise InvalidInput(
                f"{self.folder / LINES} has more than {DOCUMENT.size} bytes: give another --output"
            )
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)  # the line that a kill cut off
        for number, line in enumerate(data[:whole].splitlines(), 1):
            what = f"line {number} of {self.folder / LINES}"
            row = parse_json(line, what)
            texts = ("name", "model", "key", "status")
            if not isinstance(row, dict) or not all(isinstance(row.get(t), str) for t in texts):
                raise InvalidInput(f"{what} is no result: remove it, or give another --output")
            self.rows[row["name"]] = row


def places(row: dict) -> str:
    """The super weights of a result, as "layer 2 [3968, 7003]; ..."."""
    return "; ".join(
        f"layer {layer}{'' if expert is None else f' expert {expert}'} [{r}, {c}]"
        for layer, expert, r, c in row.get("super_weights") or []
    )


def key_of(model: str, arguments: tuple[str, ...]) -> str:
    """A digest of a checkpoint's files and of the settings: what makes a result the same.

    Of files it covers name, size and time of change, of the checkpoint and of any file that the
    arguments name; of a name on the hub the name. Nothing is read.
    """
    parts: list = [list(arguments)]
    for name in (model, *arguments):
        path = Path(os.path.expanduser(name))
        folder = os.path.isdir(path)  # False as well where a text is too long for a name
        files = sorted(path.glob("*")) if folder else [path] * os.path.isfile(path)
        parts.append([name, *(_stamp(file) for file in files if file.is_file())])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stamp(file: Path) -> tuple[str, int, int]:
    state = file.stat()
    return file.name, state.st_size, state.st_mtime_ns
