"""All checkpoints of a list: what is done is skipped, the rest goes to whatever runs tasks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from .results import Results
from .work import CANCELLED, LOG, Task

_AHEAD = 2  # tasks that are handed over for each that can run
_WAIT = 1.0  # seconds between two looks


class Executor(Protocol):
    """What runs tasks somewhere; ``swkernels.integrations.ray.RayExecutor`` is one."""

    slots: int  # tasks that can run at the same time, as far as is known

    def submit(self, task: Task) -> object:
        """Start ``run_task(task)`` and return a handle that can be hashed."""

    def finished(self, handles: list, timeout: float) -> list[tuple[object, dict]]:
        """Wait up to ``timeout`` seconds; the handles that are done, with ``run_task``'s result.

        A task whose worker was lost gives a result as well, with the status failed.
        """

    def cancel(self, handles: list) -> None:
        """Stop tasks, and wait until they have stopped."""


def scan_all(
    tasks: list[Task],
    executor: Executor,
    results: Results,
    show: Callable[[str, str, dict | None], None],
) -> list[dict]:
    """Run every task that has no result yet, and keep the results as they come.

    Args:
        tasks: of different names.
        executor: what runs them.
        results: where they are kept; what is done there is skipped.
        show: called with (name, state, result): skipped, waiting, running or finished.

    Returns:
        The result of each task, in the order of the tasks.

    Raises:
        KeyboardInterrupt: after the tasks in flight were stopped and noted as cancelled.
    """
    pending = []
    for task in tasks:
        if results.done(task.name, task.key):
            show(task.name, "skipped", results.rows[task.name])
        else:
            pending.append(task)
    pending.reverse()
    flying: dict[object, Task] = {}
    running: set[str] = set()
    try:
        while pending or flying:
            while pending and len(flying) < _AHEAD * max(1, executor.slots):
                task = pending.pop()
                with suppress(FileNotFoundError):
                    (Path(task.folder) / LOG).unlink()
                flying[executor.submit(task)] = task
                show(task.name, "waiting", None)
            for handle, row in executor.finished(list(flying), _WAIT):
                results.add(row)
                show(flying.pop(handle).name, "finished", row)
            for task in flying.values():
                # A worker says nothing until it is done; its log, on shared storage, does.
                if task.name not in running and (Path(task.folder) / LOG).exists():
                    running.add(task.name)
                    show(task.name, "running", None)
    except BaseException:
        executor.cancel(list(flying))
        for task in flying.values():
            row = {"name": task.name, "model": task.model, "key": task.key}
            results.add(row | {"status": CANCELLED, "error": "stopped before it was done"})
        raise
    return [results.rows[task.name] for task in tasks]
