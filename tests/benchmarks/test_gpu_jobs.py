"""Processes with limits: ended with all their children, their logs cut."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import jobs
from benchmarks.gpu.jobs import Job, run_all

needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="it looks into /proc")


def job(tmp_path, name, code):
    command = [sys.executable, "-c", code]
    return Job(name, command, tmp_path / f"{name}.log", dict(os.environ), tmp_path)


def test_jobs_run_beside_each_other_and_come_back_in_order(tmp_path):
    meet = "import pathlib, time\npathlib.Path('{}').touch()\n"
    meet += "while not pathlib.Path('{}').exists(): time.sleep(0.01)\nprint('{}')"
    both = [
        job(tmp_path, "a", meet.format("1", "2", "a")),
        job(tmp_path, "b", "raise SystemExit(3)"),
    ]
    both.insert(1, job(tmp_path, "c", meet.format("2", "1", "c")))
    ended = run_all(both, 30, workers=2)
    assert [(each.job.name, each.code) for each in ended] == [("a", 0), ("c", 0), ("b", 3)]
    assert ended[1].text == "c\n" and ended[2].last_line == "it printed nothing"


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def all_gone(folder):
    """Whether the processes of CHILD have ended; what is killed needs a moment."""
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return len(pids) == 2 and not any(alive(pid) for pid in pids)


CHILD = (
    "import os, signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "open('pids', 'w').write(f'{os.getpid()} {child.pid}')\n"
)


@needs_proc
def test_a_late_job_is_ended_with_its_children_though_it_ignores_the_request(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_GRACE", 0.2)
    waiting = [job(tmp_path, "a", CHILD + "time.sleep(60)"), job(tmp_path, "b", "print(1)")]
    ended = run_all(waiting, 2)
    assert [each.code for each in ended] == [None, None]
    assert ended[1].text == ""  # never started
    assert all_gone(tmp_path)


@needs_proc
def test_ctrl_c_ends_the_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_GRACE", 0.2)
    code = CHILD + "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run_all([job(tmp_path, "a", code)], 30)
    assert all_gone(tmp_path)


def test_a_long_log_keeps_its_head_and_its_tail(tmp_path):
    code = "print('first')\nfor i in range(200_000): print(i, 'x' * 10)\nprint('last')"
    (finished,) = run_all([job(tmp_path, "a", code)], 30)
    assert jobs.LOG_BYTES < finished.job.log.stat().st_size < jobs.LOG_BYTES + 100
    assert finished.text.startswith("first\n0 ") and finished.last_line == "last"
    assert "bytes were cut out here" in finished.text
