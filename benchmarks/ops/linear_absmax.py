"""Cases of ``linear_absmax``: the projections of real models."""

from __future__ import annotations

from functools import cache

import torch
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

OP = "linear_absmax"
_MEASURE = "||y - exact|| / ||exact||; infinite where a peak is not x's or y's"


def case(models, projection, tokens, rows, columns, dtype, device, *, interpreted=False, dry=False):
    """One case on x [tokens, columns] and a weight [rows, columns]."""

    def make(seed):
        scale = columns**-0.5
        return {
            "x": normal(seed, tokens, columns, dtype=dtype, device=device),
            "weight": normal(seed + 1, rows, columns, dtype=dtype, device=device, scale=scale),
        }

    def providers():
        return [
            Provider("F.linear", "bare", _bare),
            *ours(OP, _ours, device, interpreted=interpreted),
            *_variants(device, dtype, interpreted),
            Provider("F.linear, abs().max(0) twice", "eager", _eager),
            compiled(lambda: _eager, dry=dry),
            peer("quack amax epilogue, values of y", "quack", device, _quack),
        ]

    shape = {"tokens": tokens, "columns": columns, "rows": rows}
    work = expected.linear_absmax(tokens, rows, columns, dtype)
    return Case(OP, models, projection, shape, dtype, work, 5, make, judge, providers)


def judge(inputs):
    """y may be twice as far from float64 as PyTorch's; the peaks are exactly those of x and y."""
    x, weight = inputs["x"], inputs["weight"]
    wide = weight.double().T
    exact = torch.cat([block.double() @ wide for block in x.split(1024)])  # [T, D]
    limit = 2 * relative_error(_bare(inputs)["y"], exact)
    in_keys = ops.column_absmax(x, backend="reference")

    def error(outputs):
        value = relative_error(outputs["y"], exact)
        if "in_keys" in outputs:
            wrong = int((outputs["in_keys"] != in_keys).sum())
            wrong += wrong_channels(outputs["out_keys"], outputs["y"])
            value = float("inf") if wrong else value
        elif "values" in outputs:  # taken before rounding, so close and not equal
            peaks = exact.abs().amax(0)
            value = max(value, relative_error(outputs["values"][None], peaks[None]))
        return Error(value, limit, _MEASURE)

    return error


def _bare(inputs):
    return {"y": F.linear(inputs["x"], inputs["weight"])}


def _ours(inputs, *, backend):
    y, in_keys, out_keys = ops.linear_absmax(inputs["x"], inputs["weight"], backend=backend)
    return {"y": y, "in_keys": in_keys, "out_keys": out_keys}


def _eager(inputs):
    x = inputs["x"]
    y = F.linear(x, inputs["weight"])
    return {"y": y, "of_x": x.abs().max(0), "of_y": y.abs().max(0)}


def _variants(device, dtype, interpreted) -> list[Provider]:
    """Triton's fused kernel and its GEMM with passes, whichever the tuning record chooses."""
    if device.type != "cuda" and not interpreted:
        return []
    if interpreted and dtype == "bfloat16":
        return []

    def variant(fused):
        def call(inputs):
            from swkernels.backends.triton.linear_absmax import linear_absmax

            x, weight = inputs["x"], inputs["weight"]
            in_keys = ops.empty_keys(x.shape[1], x.device)
            out_keys = ops.empty_keys(weight.shape[0], x.device)
            y = linear_absmax(x, weight, None, in_keys, out_keys, None, 0, fused=fused)
            return {"y": y, "in_keys": in_keys, "out_keys": out_keys}

        return call

    return [
        Provider("swkernels (triton, fused)", "ours", variant(True)),
        Provider("swkernels (triton, two passes)", "ours", variant(False)),
    ]


@cache
def _quack_epilogue():
    from quack.epilogue import gemm_epilogue
    from quack.epilogue.ops import RowVecReduce

    @gemm_epilogue(reduces={"amax": RowVecReduce("amax", combine="max_abs")})
    def column_amax(acc):
        return {"D": acc, "amax": acc}

    return column_amax


def _quack(inputs):
    out = _quack_epilogue()(inputs["x"], inputs["weight"].T)
    return {"y": out["D"], "values": out["amax"].flatten()}
