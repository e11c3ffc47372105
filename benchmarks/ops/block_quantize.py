"""Cases of ``block_quantize``: a weight to codes of 4 or 8 bits with a scale a block."""

from __future__ import annotations

from benchmarks import expected, peers
from benchmarks.case import Case, Error, Provider, compiled, ours
from benchmarks.ceilings import read_once
from benchmarks.ops.packed import label, plain_codes, weight
from swkernels import ops
from swkernels.backends.plan import Code

OP = "block_quantize"
_MEASURE = "codes and scales that differ from the definition"


def case(
    models, projection, rows, columns, code, block, dtype, device, *, interpreted=False, dry=False
):
    """One case on w [rows, columns]; block divides its elements."""
    given = {"code": code, "block_size": block}

    def make(seed):
        return {"w": weight(seed, rows, columns, dtype, device)}

    def call(inputs, *, backend):
        q = ops.block_quantize(inputs["w"], **given, backend=backend)
        return {"codes": q.codes, "scales": q.scales}

    def plain(inputs):
        codes, scales = plain_codes(inputs["w"], code, block)
        return {"codes": codes, "scales": scales}

    def theirs(inputs):
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(inputs["w"], blocksize=block, quant_type="nf4")
        return {"codes": codes, "scales": state.absmax}

    def providers():
        return [
            Provider("read", "bare", lambda inputs: {"read": read_once(inputs["w"])}),
            *ours(OP, call, device, interpreted=interpreted),
            Provider("absmax, round and pack", "eager", plain),
            compiled(lambda: plain, dry=dry),
            peers.bitsandbytes("bitsandbytes", theirs, code, block, device),
        ]

    def judge(inputs):
        exact = ops.block_quantize(inputs["w"], **given, backend="reference")

        def error(outputs):
            wrong = 0
            if "codes" in outputs:
                wrong = int((outputs["codes"].view(-1) != exact.codes).sum())
                wrong += int((outputs["scales"].view(-1) != exact.scales).sum())
            return Error(wrong, 0, _MEASURE)

        return error

    shape = {"columns": columns, "rows": rows, "block": block}
    work = expected.block_quantize(rows, columns, Code(code).bits, block, dtype)
    slowest = 200 if code == "nf4" else 30  # of bitsandbytes, and of eager PyTorch
    return Case(
        OP, models, label(projection, code, block), shape, dtype, work, slowest, make, judge,
        providers, seconds=5.0,
    )  # fmt: skip
