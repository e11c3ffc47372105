"""Triton kernels, for NVIDIA and AMD GPUs. Importing this package does not import Triton."""

from __future__ import annotations

import importlib.util
import os

_OLDEST = (3, 4)  # the first Triton with host-side tensor descriptors


def interpreted() -> bool:
    """Return whether TRITON_INTERPRET asks for Triton's interpreter (CPU tensors, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def available() -> str | None:
    """Return None if the backend can run here, else one line: what is missing, how to get it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install triton` (Linux; PyTorch for CUDA has it)"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        return f"Triton {triton.__version__} is too old: `pip install 'triton>=3.4'`"
    import torch

    if not torch.cuda.is_available() and not interpreted():
        return (
            "PyTorch sees no GPU; set TRITON_INTERPRET=1 before Python starts to run the kernels "
            "on the CPU in Triton's interpreter (slow, for tests)"
        )
    return None
