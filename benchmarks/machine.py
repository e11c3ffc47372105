"""What a record says of the machine, the versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import swkernels
from benchmarks import records
from swkernels.errors import InvalidInput

_ROOT = Path(__file__).parents[1]
_MEASURED = ("csrc", "swkernels", "benchmarks", "setup.py", "pyproject.toml")
_RECORDS = (":!benchmarks/results", ":!benchmarks/RESULTS.md")
_PACKAGES = ("triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "quack-kernels")


def device(suite: str, *, dry: bool) -> torch.device:
    """Where a suite runs.

    Raises:
        InvalidInput: the suite needs a GPU and there is none.
    """
    there = torch.cuda.is_available()
    if suite == "gpu" and not there:
        if not dry:
            raise InvalidInput("--suite gpu needs a GPU, PyTorch sees none: take --suite cpu")
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise InvalidInput("--suite gpu --dry needs TRITON_INTERPRET=1 without a GPU: set it")
    return torch.device("cuda" if there and suite != "cpu" else "cpu")


def header(suite: str, device: torch.device, *, quick: bool, dry: bool) -> dict:
    """The fields of a run that do not depend on what it measures."""
    return {
        "kind": "run",
        "schema": records.SCHEMA,
        "suite": suite,
        "quick": quick,
        "dry": dry,
        **provenance(),
        "device": describe(device),
        "versions": _versions(),
    }


def provenance() -> dict:
    """When and of which source something is measured."""
    return {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **_commit()}


def describe(device: torch.device) -> dict:
    """Name, cores, threads, bytes of the last cache and of memory."""
    return _gpu(device) if device.type == "cuda" else _cpu()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "swkernels": swkernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> dict:
    """HEAD, and whether what is measured differs from it; a copy without git may name it in
    SWKERNELS_COMMIT."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", *_MEASURED, *_RECORDS)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("SWKERNELS_COMMIT"), "modified": False}
    return {"commit": commit, "modified": bool(changed)}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "cores": properties.multi_processor_count,
        "threads": None,
        "cache_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }


def _cpu() -> dict:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "type": "cpu",
        "name": f"{_cpu_name()}, {cores} cores",
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cache_bytes": _last_cache(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _last_cache() -> int:
    """Bytes of the largest cache that this CPU sees; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1])
        if unit:
            sizes.append(int(text[:-1]) * unit)
    return max(sizes)
