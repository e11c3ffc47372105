"""A fleet over Ray's local mode: scans that fail, workers that die, what is refused."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from swkernels.errors import InvalidInput
from swkernels.integrations.fleet import Results, Task, scan_all
from swkernels.integrations.ray import RayExecutor, _slots

ray = pytest.importorskip("ray")

# Stands for ``swkernels scan MODEL -o FOLDER``, without the seconds that importing PyTorch takes.
SCAN = """
import json, os, pathlib, sys, time
_, model, _, folder = sys.argv[1:]
folder = pathlib.Path(folder)
if model == "damaged":
    print("swkernels: error: it is truncated", file=sys.stderr)
    sys.exit(2)
if model == "hit" and not (folder / "worker").exists():
    (folder / "worker.tmp").write_text(str(os.getppid()))
    os.rename(folder / "worker.tmp", folder / "worker")
    time.sleep(60)
(folder / "report.json").write_text(json.dumps(
    {"summary": "none", "model": {"parameters": 7}, "candidates": []}))
"""


def _kill_worker(told: Path, killed: list[int]) -> None:
    for _ in range(600):
        if told.exists():
            killed.append(int(told.read_text()))
            os.kill(killed[0], signal.SIGKILL)
            return
        time.sleep(0.05)


def test_three_checkpoints_one_damaged_one_whose_worker_is_killed(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    tasks = [
        Task(
            name=name,
            model=name,
            folder=str(tmp_path / name),
            key="k",
            retries=1,
            command=(sys.executable, "-c", SCAN),
        )
        for name in ("good", "damaged", "hit")
    ]
    killed: list[int] = []
    killer = threading.Thread(target=_kill_worker, args=(tmp_path / "hit" / "worker", killed))
    killer.start()
    with Results(tmp_path) as results, RayExecutor() as executor:
        rows = scan_all(tasks, executor, results, lambda *told: None)
    killer.join()
    assert len(killed) == 1 and killed[0] != os.getpid()
    assert [(row["status"], row["attempts"]) for row in rows] == [
        ("done", 1),
        ("failed", 1),
        ("done", 2),
    ]
    assert rows[1]["error"] == "it is truncated"
    assert not ray.is_initialized()


def test_what_fits():
    needs = {"CPU": 4, "GPU": 0.5, "memory": 0}
    machines = [{"CPU": 16.0, "GPU": 1.0, "memory": 5.0}, {"CPU": 2.0}, {"CPU": 4.0, "GPU": 8.0}]
    assert _slots(machines, needs) == 3
    with pytest.raises(InvalidInput, match="no machine of Ray has .*CPU 4, GPU 0.5"):
        _slots(machines[1:2], needs)
