"""Cases of ``glu_absmax``: the gated product of SwiGLU."""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks import expected
from benchmarks.case import (
    Case,
    Error,
    Provider,
    compiled,
    normal,
    ours,
    peer,
    relative_error,
    wrong_channels,
)
from swkernels import ops

OP = "glu_absmax"
_MEASURE = "||h - exact|| / ||exact||; infinite where a peak is not h's"


def case(models, projection, tokens, columns, dtype, device, *, interpreted=False, dry=False):
    """One case on gate and up [tokens, columns] with SiLU."""

    def make(seed):
        return {
            name: normal(seed + place, tokens, columns, dtype=dtype, device=device)
            for place, name in enumerate(("gate", "up"))
        }

    def providers():
        return [
            Provider("silu(gate) * up", "bare", _bare),
            *ours(OP, _ours, device, interpreted=interpreted),
            Provider("silu(gate) * up, abs().max(0)", "eager", _eager),
            compiled(lambda: _eager, dry=dry),
            peer("Liger SwiGLU, no peaks", "liger_kernel", device, _liger),
        ]

    shape = {"tokens": tokens, "columns": columns}
    work = expected.glu_absmax(tokens, columns, dtype)
    return Case(OP, models, projection, shape, dtype, work, 20, make, judge, providers)


def judge(inputs):
    """h may be twice as far from float64 as eager PyTorch's; the peaks are exactly those of h."""
    exact = F.silu(inputs["gate"].double()) * inputs["up"].double()
    limit = 2 * relative_error(_bare(inputs)["h"], exact)

    def error(outputs):
        value = relative_error(outputs["h"], exact)
        if "keys" in outputs and wrong_channels(outputs["keys"], outputs["h"]):
            value = float("inf")
        return Error(value, limit, _MEASURE)

    return error


def _bare(inputs):
    return {"h": F.silu(inputs["gate"]) * inputs["up"]}


def _ours(inputs, *, backend):
    h, keys = ops.glu_absmax(inputs["gate"], inputs["up"], backend=backend)
    return {"h": h, "keys": keys}


def _eager(inputs):
    h = F.silu(inputs["gate"]) * inputs["up"]
    values, tokens = h.abs().max(0)
    return {"h": h, "values": values, "tokens": tokens}


def _liger(inputs):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return {"h": LigerSiLUMulFunction.apply(inputs["gate"], inputs["up"])}
