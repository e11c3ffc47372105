"""Run commands beside each other, each with a log file and a limit of time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOG_BYTES = 512 << 10  # of one log file, after it was cut

_POLL = 0.02  # seconds
_GRACE = 3.0  # seconds between the request to end and the end by force


@dataclass(frozen=True)
class Job:
    """A command, where it runs, and the file that takes what it prints."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    folder: Path


@dataclass(frozen=True)
class Finished:
    """How a job ended: its exit code, or None where it ran out of time or was never started."""

    job: Job
    code: int | None
    seconds: float

    @property
    def text(self) -> str:
        """What it printed."""
        if not self.job.log.exists():
            return ""
        return self.job.log.read_text(encoding="utf-8", errors="replace")

    @property
    def last_line(self) -> str:
        """The last thing it said: of a Python program that failed, the error."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return lines[-1][:200] if lines else "it printed nothing"


def run_all(jobs: Sequence[Job], seconds: float, *, workers: int = 1) -> list[Finished]:
    """Run jobs, ``workers`` at a time, in their order; return how they ended, in their order.

    After ``seconds`` what still runs is ended, and what waits is not started. Whatever ends this
    function, Ctrl-C too, ends the jobs with all their children.
    """
    deadline = time.monotonic() + seconds
    waiting = deque(jobs)
    running: list[_Running] = []
    finished: dict[str, Finished] = {}
    try:
        while waiting or running:
            late = time.monotonic() >= deadline
            while waiting and len(running) < workers and not late:
                running.append(_Running(waiting.popleft()))
            for each in list(running):
                if late or each.process.poll() is not None:
                    running.remove(each)
                    finished[each.job.name] = each.finish()
            if late:
                finished |= {job.name: Finished(job, None, 0.0) for job in waiting}
                break
            time.sleep(_POLL)
    finally:
        for each in running:
            each.finish()
    return [finished[job.name] for job in jobs]


class _Running:
    def __init__(self, job: Job):
        self.job = job
        self._started = time.monotonic()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "wb") as log:
            # A session of its own, so that its children can be ended with it.
            self.process = subprocess.Popen(
                job.command, cwd=job.folder, env=dict(job.environment), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finish(self) -> Finished:
        """End the job if it still runs, with its children; cut its log."""
        code = self.process.poll()
        if code is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)
        self._signal(signal.SIGKILL)  # what ignored the request, and children left behind
        self.process.wait()
        cut(self.job.log)
        return Finished(self.job, code, time.monotonic() - self._started)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def cut(log: Path, most: int = LOG_BYTES) -> None:
    """Keep the head and the tail of a file that has more than ``most`` bytes."""
    size = log.stat().st_size
    if size <= most:
        return
    half = most // 2
    with open(log, "rb") as file:
        head = file.read(half)
        file.seek(size - half)
        tail = file.read()
    note = f"\n\n[{size - 2 * half} bytes were cut out here]\n\n"
    log.write_bytes(head + note.encode() + tail)
