"""Say what this machine is, as JSON: ``python -m benchmarks.gpu.environment FILE``.

A process of its own: a driver or an installation that is broken ends it, not the run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_TESTED_WITH = ("numpy", "setuptools", "pytest", "hypothesis")  # beside what a record names
# The sections of `nvidia-smi -q` that bear on speed and correctness; the rest is long.
_SECTIONS = re.compile(
    r"driver version|cuda version|product name|vbios|mig mode|ecc mode|persistence mode"
    r"|performance state|power limit|power draw|gpu current temp|slowdown|^ +(sm|memory) +:"
    r"|clocks|compute mode|addressing mode",
    re.IGNORECASE,
)


def describe() -> dict:
    """Return versions, GPUs and tools; what is not there is None or empty."""
    import torch

    from benchmarks import machine

    gpus = range(torch.cuda.device_count())
    header = machine.header("gpu", torch.device("cuda" if gpus else "cpu"), quick=True, dry=False)
    return {
        **{name: header[name] for name in ("time", "commit", "modified")},
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "versions": header["versions"] | {name: _version(name) for name in _TESTED_WITH},
        "hip": torch.version.hip,
        "gpus": [_gpu(torch, index) for index in gpus],
        "nvcc": _output("nvcc", "--version")[-2:],
        "compute-sanitizer": _output("compute-sanitizer", "--version")[-2:],
        "nvidia-smi": [line for line in _output("nvidia-smi", "-q") if _SECTIONS.search(line)],
    }


def _gpu(torch, index: int) -> dict:
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    return {
        "name": properties.name,
        "architecture": properties.gcnArchName.split(":")[0]
        if hip
        else f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(tool: str, *arguments: str) -> list[str]:
    """The lines that a tool prints, none where it is missing or fails."""
    path = shutil.which(tool)
    if path is None:
        return []
    try:
        result = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.rstrip() for line in result.stdout.splitlines() if line.strip()]


if __name__ == "__main__":
    text = json.dumps(describe(), indent=2)
    Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
    print(text)
