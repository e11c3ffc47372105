"""One scan of a fleet, in a process of its own, with retries: what a worker runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from swkernels.errors import InvalidInput
from swkernels.files import read_json, write_atomically

MAY_PASS = 75  # EX_TEMPFAIL: the exit code of a scan whose error may pass
DONE, FAILED, TIMEOUT, CANCELLED = "done", "failed", "timeout", "cancelled"
LOG, KEY = "scan.log", "fleet.key"
_ATTEMPT = "--- attempt "
_ERROR = "swkernels: error: "
_PATIENCE = 10.0  # seconds that a scan has to stop by itself
_FOUND = ("super weight", "part of a critical set")  # verdicts of a report


@dataclass(frozen=True)
class Task:
    """One scan to make.

    Attributes:
        name: of the checkpoint, in tables.
        model: what ``swkernels scan`` takes.
        folder: where the report goes; on storage that every worker sees.
        arguments: more arguments of ``swkernels scan``.
        key: of files and settings; a state that another key has left is not taken up.
        retries: how often a scan that died, or whose error may pass, is started again.
        timeout: seconds for all attempts of one worker; None has no end.
        pause: seconds before the first retry, twice as many before each further one.
        command: what runs ``scan MODEL ...``.
    """

    name: str
    model: str
    folder: str
    arguments: tuple[str, ...] = ()
    key: str = ""
    retries: int = 2
    timeout: float | None = None
    pause: float = 2.0
    command: tuple[str, ...] = (sys.executable, "-m", "swkernels.cli.child")


def run_task(task: Task) -> dict:
    """Scan, again where it may help, and say what came of it; an error of a scan raises nothing.

    A worker that is started again after it died counts the attempts of the one before.

    Returns:
        name, model, key, status (done, failed, timeout), seconds, attempts, error, and of a scan
        that is done summary, super_weights ([layer, expert, row, column] each) and parameters.
    """
    begin = time.monotonic()
    row = {"name": task.name, "model": task.model, "key": task.key, "status": FAILED}
    deadline = None if task.timeout is None else begin + task.timeout
    error = None
    attempts = 0
    try:
        folder = Path(task.folder)
        folder.mkdir(parents=True, exist_ok=True)
        fresh = _another_key(folder, task.key)
        write_atomically(folder / KEY, task.key)
        attempts = attempts_of(folder)
        error = f"the worker died {attempts} times" if attempts else None
        while attempts <= task.retries:
            attempts += 1
            code = _attempt(task, attempts, fresh and attempts == 1, deadline)
            if code == 0:
                return row | _found(folder, attempts, begin)
            error = _error(folder, code)
            if code is None:
                row["status"] = TIMEOUT
                break
            # A signal's number is negative: killed for memory, or a fault in native code.
            if code >= 0 and code != MAY_PASS:
                break
            if attempts <= task.retries:
                _sleep(task.pause * 2 ** (attempts - 1), deadline)
    except (OSError, InvalidInput) as problem:
        error = " ".join(str(problem).split())
    return row | {"seconds": _seconds(begin), "attempts": attempts, "error": error}


def attempts_of(folder: Path) -> int:
    """How many attempts the log of this run names; 0 where there is none."""
    with suppress(OSError):
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
        return sum(line.startswith(_ATTEMPT) for line in text.splitlines())
    return 0


def _another_key(folder: Path, key: str) -> bool:
    with suppress(OSError):
        return (folder / KEY).read_text(encoding="utf-8") != key
    return False


def _attempt(task: Task, number: int, fresh: bool, deadline: float | None) -> int | None:
    """Run the scan once; its exit code, or None where time ran out."""
    command = [*task.command, "scan", task.model, "-o", task.folder, *task.arguments]
    if fresh:
        command.append("--fresh")
    with open(Path(task.folder) / LOG, "a", encoding="utf-8") as log:
        log.write(f"{_ATTEMPT}{number}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"SWKERNELS_PARENT": str(os.getpid())},
        )
        try:
            while True:
                # Short waits: a worker is told to stop by an exception between two steps.
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=0.5)
                if deadline is not None and time.monotonic() > deadline:
                    return None
        finally:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """Let a scan that still runs clean up and go, and end it where it does not."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_PATIENCE)


def _sleep(seconds: float, deadline: float | None) -> None:
    if deadline is not None:
        seconds = min(seconds, max(0.0, deadline - time.monotonic()))
    time.sleep(seconds)


def _found(folder: Path, attempts: int, begin: float) -> dict:
    report = read_json(folder / "report.json")
    try:
        return {
            "status": DONE,
            "seconds": _seconds(begin),
            "attempts": attempts,
            "error": None,
            "summary": report["summary"],
            "super_weights": [
                [c["layer"], c["expert"], c["row"], c["column"]]
                for c in report["candidates"]
                if c["verdict"] in _FOUND
            ],
            "parameters": report["model"]["parameters"],
        }
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{folder / 'report.json'} is no report of a scan: {error!r}") from error


def _error(folder: Path, code: int | None) -> str:
    if code is None:
        return "time ran out (--timeout)"
    if code < 0:
        kill = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"the scan was ended by {signal.Signals(-code).name}{kill}"
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    if told:
        return told[-1]
    return f"exit code {code}: {lines[-1].strip() if lines else 'nothing said'}"


def _seconds(begin: float) -> float:
    return round(time.monotonic() - begin, 3)
