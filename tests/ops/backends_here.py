"""Which backends can run on this machine's CPU tensors or GPU."""

from __future__ import annotations

import pytest
import torch

from swkernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def runnable(op: str) -> list:
    """pytest parameters: every backend, those that cannot run here skipped with their reason."""
    elsewhere = "cuda" if DEVICE == "cpu" else "cpu"
    parameters = []
    for name in backends.BACKENDS:
        if name == "cuda" and op != "column_absmax":
            continue
        reason = backends._refusal(name, op, backends._probe(op, DEVICE))
        assert reason is None or name == elsewhere, f"{name} should serve {op} here: {reason}"
        marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
        parameters.append(pytest.param(name, marks=marks))
    return parameters
