"""Records of measurements: JSON lines, one file a machine and commit (see results/README.md)."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from swkernels.errors import InvalidInput

SCHEMA = "swkernels.record/1"
RESULTS = Path(__file__).parent / "results"

STATUSES = ("ok", "wrong", "failed", "unavailable", "skipped")
ROLES = ("ours", "bare", "eager", "compile", "peer")
SPEED = ("median", "p20", "p80", "runs", "graph", "share", "ceiling")

_HEADER = {
    "kind", "schema", "run", "suite", "quick", "dry", "time", "commit", "modified", "command",
    "device", "versions", "ceilings",
}  # fmt: skip
_RESULT = {
    "kind", "run", "op", "case", "models", "projection", "shape", "dtype", "provider", "role",
    "status", "reason", *SPEED, "flop", "bytes", "peak_memory", "error",
}  # fmt: skip
OF_MODELS = ("weights", "step_memory")  # fields that a result of a whole model may have besides


@dataclass(frozen=True)
class Run:
    """One run of the benchmarks: its header line and its results, in the order of measurement."""

    header: dict
    results: list[dict]
    path: Path

    @property
    def lines(self) -> list[dict]:
        """As they stand in the file."""
        return [self.header, *self.results]


def default_path(device_name: str, commit: str | None, folder: Path = RESULTS) -> Path:
    """The file of a machine and commit."""
    return folder / f"{slug(device_name)}-{(commit or 'no-commit')[:12]}.jsonl"


def slug(device_name: str) -> str:
    """A machine's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def write(path: Path, header: dict, results: list[dict]) -> None:
    """Append a run to a file, or replace it if it is there: written aside and renamed.

    Raises:
        InvalidInput: the run does not follow the schema, or the file is broken; it is unchanged.
    """
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = [run for run in _parse(before, path) if run.header["run"] != header["run"]]
    lines = [line for run in [*kept, Run(header, results, path)] for line in run.lines]
    _assemble(lines, path)
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def read(folder: Path = RESULTS) -> list[Run]:
    """Every run in the files of a folder, oldest first.

    Raises:
        InvalidInput: a line does not follow the schema; it is named.
    """
    runs = [
        run
        for path in sorted(folder.glob("*.jsonl"))
        for run in _parse(path.read_text(encoding="utf-8"), path)
    ]
    return sorted(runs, key=lambda run: (run.header["time"], run.header["run"]))


def _parse(text: str, path: Path) -> list[Run]:
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise InvalidInput(f"{path}, line {number}: not JSON: {error}") from error
    return _assemble(lines, path)


def _assemble(lines: list[dict], path: Path) -> list[Run]:
    """Check every line and put the results under their headers."""
    runs: dict[str, Run] = {}
    for number, line in enumerate(lines, 1):
        try:
            if line.get("kind") == "run":
                _check_header(line)
                runs[line["run"]] = Run(line, [], path)
            else:
                _check_result(line)
                runs[line["run"]].results.append(line)
        except KeyError as error:
            raise InvalidInput(f"{path}, line {number}: no header for run {error}") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise InvalidInput(f"{path}, line {number}: {error}") from error
    return list(runs.values())


def _check_header(header: dict) -> None:
    _check_fields(header, _HEADER)
    if header["schema"] != SCHEMA:
        raise ValueError(f"schema is {header['schema']!r}, expected {SCHEMA!r}")


def _check_result(result: dict) -> None:
    _check_fields(result, _RESULT, set(OF_MODELS))
    status, role = result["status"], result["role"]
    if status not in STATUSES:
        raise ValueError(f"status is {status!r}, expected one of {', '.join(STATUSES)}")
    if role not in ROLES and not (role is None and status == "skipped"):
        raise ValueError(f"role is {role!r}, expected one of {', '.join(ROLES)}")
    timed = [name for name in SPEED if result[name] is not None]
    if status == "ok" and (len(timed) != len(SPEED) or not _positive(result["median"])):
        raise ValueError(f"a result that is ok needs {', '.join(SPEED)}; it has {timed}")
    if status != "ok" and timed:
        raise ValueError(f"a result that is {status!r} must have no speed, it has {timed}")
    if status != "ok" and not result["reason"]:
        raise ValueError(f"a result that is {status!r} needs a reason")
    error = result["error"]
    if status == "ok" and error is not None and not error["value"] <= error["limit"]:
        raise ValueError(f"error {error['value']} is over its limit {error['limit']}: not ok")


def _check_fields(content: dict, expected: set[str], optional: set[str] = frozenset()) -> None:
    missing, unknown = expected - content.keys(), content.keys() - expected - optional
    if missing or unknown:
        raise ValueError(
            f"a {content.get('kind')!r} line lacks {sorted(missing)} and has unknown "
            f"{sorted(unknown)} (schema {SCHEMA})"
        )


def _positive(seconds: object) -> bool:
    return isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds > 0
