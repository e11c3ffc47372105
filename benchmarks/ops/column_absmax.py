"""Cases of ``column_absmax``: the inputs and outputs of down projections."""

from __future__ import annotations

import torch

from benchmarks import expected
from benchmarks.case import Case, Error, Provider, compiled, normal, ours, wrong_channels
from benchmarks.ceilings import read_once
from benchmarks.shapes import MODELS
from swkernels import ops

OP = "column_absmax"
_MEASURE = "channels whose peak differs"


def case(models, projection, tokens, columns, dtype, device, *, interpreted=False, dry=False):
    """One case on x [tokens, columns]."""

    def make(seed):
        x = normal(seed, tokens, columns, dtype=dtype, device=device)
        # A spike in every channel, the rows in turn from the last: a kernel that leaves a row
        # out is then seen, and activations have such spikes.
        channels = torch.arange(columns, device=device)
        x[(tokens - 1 - channels) % tokens, channels] = -64.0
        return {"x": x}

    def providers():
        return [
            Provider("read", "bare", lambda inputs: {"read": read_once(inputs["x"])}),
            *ours(OP, _ours, device, interpreted=interpreted),
            Provider("abs().max(0)", "eager", _eager),
            Provider(
                "abs().amax(0), no positions", "bare", lambda i: {"values": i["x"].abs().amax(0)}
            ),
            Provider("vector_norm(inf), no positions", "bare", _norm),
            compiled(lambda: _eager, dry=dry),
        ]

    shape = {"tokens": tokens, "columns": columns}
    work = expected.column_absmax(tokens, columns, dtype)
    return Case(OP, models, projection, shape, dtype, work, 40, make, judge, providers)


def sizes() -> list[tuple[tuple[str, ...], str, int]]:
    """Models, name and channels of the inputs and outputs of their down projections."""
    found: dict[tuple[str, int], list[str]] = {}
    for model in MODELS:
        found.setdefault(("down_proj input", model.intermediate), []).append(model.name)
        found.setdefault(("down_proj output", model.hidden), []).append(model.name)
    return [(tuple(models), name, columns) for (name, columns), models in found.items()]


def judge(inputs):
    """Peaks are exact: the error is the number of channels that differ, and none may."""
    x = inputs["x"]
    exact = x.abs().amax(0).float()

    def error(outputs):
        wrong = 0
        if "keys" in outputs:
            wrong = wrong_channels(outputs["keys"], x)
        elif "values" in outputs:
            wrong = int((outputs["values"].float() != exact).sum())
        return Error(wrong, 0, _MEASURE)

    return error


def _ours(inputs, *, backend):
    return {"keys": ops.column_absmax(inputs["x"], backend=backend)}


def _eager(inputs):
    values, tokens = inputs["x"].abs().max(0)
    return {"values": values, "tokens": tokens}


def _norm(inputs):
    return {"values": torch.linalg.vector_norm(inputs["x"], torch.inf, dim=0)}
