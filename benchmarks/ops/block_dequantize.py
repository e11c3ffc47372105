"""Cases of ``block_dequantize``: the values of a packed weight."""

from __future__ import annotations

import torch

from benchmarks import expected, peers
from benchmarks.case import Case, Error, Provider, compiled, ours
from benchmarks.ops.packed import label, packed, plain_values, tensors_of, weight
from swkernels import ops
from swkernels.backends.plan import Code

OP = "block_dequantize"
_MEASURE = "values that differ from the definition"


def case(
    models, projection, rows, columns, code, block, dtype, device, *, interpreted=False, dry=False
):
    """One case on a packed w [rows, columns]; block divides its elements."""
    how = rows, columns, code, block, dtype

    def make(seed):
        return tensors_of(weight(seed, rows, columns, dtype, device), code, block)

    def call(inputs, *, backend):
        return {"w": ops.block_dequantize(packed(inputs, *how), backend=backend)}

    def plain(inputs):
        values = plain_values(inputs["codes"], inputs["scales"], code, block)
        return {"w": values.view(rows, columns).to(getattr(torch, dtype))}

    def theirs(inputs):
        given = inputs["codes"], inputs["scales"], rows, columns, block
        return {"w": peers.nf4_values(*given, getattr(torch, dtype))}

    def write(inputs):
        torch.full((rows, columns), 0.5, dtype=getattr(torch, dtype), device=device)
        return {}

    def providers():
        return [
            Provider("write", "bare", write),
            *ours(OP, call, device, interpreted=interpreted),
            Provider("unpack and scale", "eager", plain),
            compiled(lambda: plain, dry=dry),
            peers.bitsandbytes("bitsandbytes", theirs, code, block, device),
        ]

    def judge(inputs):
        exact = ops.block_dequantize(packed(inputs, *how), backend="reference")

        def error(outputs):
            wrong = int((outputs["w"] != exact).sum()) if "w" in outputs else 0
            return Error(wrong, 0, _MEASURE)

        return error

    shape = {"columns": columns, "rows": rows, "block": block}
    work = expected.block_dequantize(rows, columns, Code(code).bits, block, dtype)
    return Case(
        OP, models, label(projection, code, block), shape, dtype, work, 30, make, judge,
        providers, seconds=5.0,
    )  # fmt: skip
