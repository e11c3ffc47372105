"""Scans of many checkpoints, whatever runs them: the list, one scan, the results."""

from __future__ import annotations

from .listing import Checkpoint, read_list
from .results import Results
from .run import Executor, scan_all
from .work import Task, run_task

__all__ = ["Checkpoint", "Executor", "Results", "Task", "read_list", "run_task", "scan_all"]
