"""Cases of ``topk_abs``: the largest entries of one weight, or of one projection in all layers."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks import expected
from benchmarks.case import Case, Error, Provider, compiled, normal, ours
from benchmarks.ceilings import read_once
from swkernels import ops

OP = "topk_abs"
COUNT = 10_000
_MEASURE = "entries that are not the next largest"


def case(models, projection, matrices, rows, columns, dtype, device, *, dry=False):
    """One case on `matrices` weights [rows, columns], k = 10,000 (dry: 20)."""
    k = 20 if dry else COUNT

    def make(seed):
        return {"w": normal(seed, matrices, rows, columns, dtype=dtype, device=device)}

    def call(inputs, *, backend):
        found = ops.topk_abs(list(inputs["w"]), k, backend=backend)
        return {"places": (found.tensor * rows + found.row) * columns + found.column}

    def eager(inputs):
        return {"places": inputs["w"].abs().flatten().topk(k).indices}

    def partition(inputs):
        magnitudes = np.abs(inputs["w"].numpy()).ravel()
        best = np.argpartition(magnitudes, len(magnitudes) - k)[-k:]
        return {"places": torch.from_numpy(best[np.argsort(-magnitudes[best])])}

    def providers():
        missing = None
        if device.type != "cpu" or dtype != "float32":
            missing = f"NumPy has no {dtype} on {device.type}"
        return [
            Provider("read", "bare", lambda inputs: {"read": read_once(inputs["w"])}),
            *ours(OP, call, device, interpreted=False),
            Provider("abs().topk(k)", "eager", eager),
            compiled(lambda: eager, dry=dry),
            Provider("NumPy argpartition", "peer", partition, missing),
        ]

    def judge(inputs):
        w = inputs["w"]

        def error(outputs):
            if "places" not in outputs:
                return Error(0, 0, _MEASURE)
            places = outputs["places"]
            values = w.flatten()[places].abs()
            # No order of all entries is needed: what is above the least of those found is counted.
            above = sum(int((matrix.abs() > values.min()).sum()) for matrix in w)
            wrong = abs(above - int((values > values.min()).sum())) + k - len(places.unique())
            return Error(wrong + int((values.double().diff() > 0).sum()), 0, _MEASURE)

        return error

    shape = {"rows": rows, "columns": columns, "k": k}
    work = expected.topk_abs(matrices, rows, columns, k, dtype)
    layers = f" of {matrices} layers" if matrices > 1 else ""
    label = f"{projection}{layers}, k = {k}"
    return Case(OP, models, label, shape, dtype, work, 400, make, judge, providers, seconds=8.0)
