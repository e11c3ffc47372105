"""Which backends can run on this machine's CPU tensors or GPU."""

from __future__ import annotations

import pytest
import torch

from swkernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def runnable(op: str) -> list:
    """pytest parameters: every backend, those that cannot run here skipped with their reason."""
    rows = {row["op"]: row for row in backends.explain(DEVICE)}
    parameters = []
    for name in backends.BACKENDS:
        if name == "cuda" and op != "column_absmax":
            continue
        reason = backends._refusal(name, op, backends._probe(op, DEVICE))
        unavailable = reason is not None and name in ("cuda",) and DEVICE == "cpu"
        assert reason is None or unavailable, f"{name} should serve {op} here: {reason}, {rows}"
        marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
        parameters.append(pytest.param(name, marks=marks))
    return parameters
