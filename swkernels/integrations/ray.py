"""Scans of a fleet as tasks of Ray: on a cluster, or on this machine by Ray's local mode."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

from swkernels.errors import InvalidInput, SwkernelsError

from .fleet.work import FAILED, Task, attempts_of, run_task

_STOP = 15.0  # seconds that tasks have to stop by themselves before their workers are ended


class RayExecutor:
    """Runs each task on a worker of Ray; a context manager, which disconnects.

    Args:
        address: of a cluster ("auto", "host:6379", "ray://host:10001"); None: that of RAY_ADDRESS,
            else Ray is started on this machine, and ended with this context.
        cpus, gpus: what Ray sets aside for a task.
        memory: bytes that Ray sets aside for a task, or None.

    Raises:
        InvalidInput: Ray is not installed, the cluster cannot be reached, or no machine of it has
            what a task needs.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        cpus: float = 1,
        gpus: float = 0,
        memory: int | None = None,
    ):
        if importlib.util.find_spec("ray") is None:
            raise InvalidInput("scan-many needs the library ray: pip install 'swkernels[ray]'")
        # Read when Ray is imported or started.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        self._tasks: dict = {}
        address = address or os.environ.get("RAY_ADDRESS") or None
        local = {"include_dashboard": False} if address in (None, "local") else {}
        try:
            ray.init(
                address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=True,
                **local,
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            where = f"the cluster at {address}" if address else "Ray on this machine"
            raise InvalidInput(
                f"cannot reach {where}: {' '.join(str(error).split())[:300]}; see ray status"
            ) from error
        try:
            needs = {"CPU": cpus, "GPU": gpus, "memory": memory or 0}
            self._options = {"num_cpus": cpus, "num_gpus": gpus} | (
                {"memory": memory} if memory else {}
            )
            self.slots = _slots([n["Resources"] for n in ray.nodes() if n["Alive"]], needs)
        except BaseException:
            ray.shutdown()
            raise

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *error) -> None:
        self._ray.shutdown()

    def submit(self, task: Task) -> object:
        """Hand a task to Ray, which starts it again where its worker or machine dies."""
        remote = self._ray.remote(run_task).options(
            name=f"scan {task.name}", max_retries=task.retries, **self._options
        )
        handle = remote.remote(task)
        self._tasks[handle] = task
        return handle

    def finished(self, handles: list, timeout: float) -> list[tuple[object, dict]]:
        """The tasks that are done; one whose worker was lost too often has failed."""
        done, _ = self._ray.wait(handles, num_returns=len(handles), timeout=timeout)
        return [(handle, self._result(handle)) for handle in done]

    def cancel(self, handles: list) -> None:
        """Interrupt tasks, so that scans can clean up; end those that do not stop."""
        for handle in handles:
            self._ray.cancel(handle)
        if handles:
            _, left = self._ray.wait(handles, num_returns=len(handles), timeout=_STOP)
            for handle in left:
                self._ray.cancel(handle, force=True)

    def _result(self, handle) -> dict:
        task = self._tasks.pop(handle)
        try:
            return self._ray.get(handle)
        except (self._ray.exceptions.RayError, SwkernelsError) as error:
            return {
                "name": task.name,
                "model": task.model,
                "key": task.key,
                "status": FAILED,
                "attempts": attempts_of(Path(task.folder)),
                "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            }


def _slots(machines: list[dict[str, float]], needs: dict[str, float]) -> int:
    """How many tasks fit at once on machines of these resources."""
    fits = [
        min((int(has.get(name, 0) / need) for name, need in needs.items() if need), default=1)
        for has in machines
    ]
    if not any(fits):
        wanted = ", ".join(f"{name} {need:g}" for name, need in needs.items() if need)
        raise InvalidInput(
            f"no machine of Ray has what a scan is to have ({wanted}): lower --cpus, --gpus or "
            "--memory"
        )
    return sum(fits)
