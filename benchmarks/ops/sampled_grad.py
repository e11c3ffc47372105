"""Cases of ``sampled_grad``: the gradient of a down projection at k coordinates."""

from __future__ import annotations

import torch

from benchmarks import expected
from benchmarks.case import Case, Error, Provider, compiled, normal, ours, relative_error
from swkernels import ops

OP = "sampled_grad"
COUNTS = (256, 4096, 36864)
_MEASURE = "||dW - exact|| / ||exact|| at the coordinates"


def case(
    models, projection, tokens, rows, columns, k, dtype, device, *, interpreted=False, dry=False
):
    """One case on dy [tokens, rows], x [tokens, columns] and k random coordinates.

    k = 36,864 is the neighbourhood of radius 1 of 4,096 weights: patches of 3 x 3.
    """

    def make(seed):
        coordinates = _coordinates(seed, rows, columns, k, device)
        return {
            "dy": normal(seed, tokens, rows, dtype=dtype, device=device),
            "x": normal(seed + 1, tokens, columns, dtype=dtype, device=device),
            "rows": coordinates[0],
            "cols": coordinates[1],
        }

    def providers():
        return [
            Provider("dense gradient, no gather", "bare", lambda i: {"dense": i["dy"].T @ i["x"]}),
            *ours(OP, _ours, device, interpreted=interpreted),
            Provider("dense gradient and gather", "eager", _dense),
            Provider("gathered columns, multiplied and summed", "eager", _gathered),
            compiled(lambda: _gathered, dry=dry),
        ]

    shape = {"tokens": tokens, "columns": columns, "rows": rows, "k": k}
    work = expected.sampled_grad(tokens, rows, columns, k, dtype)
    label = f"{projection} at {k} coordinates"
    return Case(OP, models, label, shape, dtype, work, 30, make, judge, providers)


def _coordinates(seed, rows, columns, k, device):
    """k different coordinates sorted by column; patches of 3 x 3 where k divides by 9."""
    generator = torch.Generator().manual_seed(seed)
    if k % 9:
        flat = torch.randperm(rows * columns, generator=generator)[:k]
    else:  # centres on a grid of patches, so that none overlap
        wide = columns // 3
        centres = torch.randperm((rows // 3) * wide, generator=generator)[: k // 9]
        row = (centres // wide * 3)[:, None] + torch.arange(9) // 3
        flat = (row * columns + (centres % wide * 3)[:, None] + torch.arange(9) % 3).flatten()
    by_column = (flat % columns * rows + flat // columns).sort().values
    return tuple(v.int().to(device) for v in (by_column % rows, by_column // rows))


def judge(inputs):
    """At most twice as far from float64 as PyTorch's dense gradient at the same coordinates."""
    rows, cols = inputs["rows"].long(), inputs["cols"].long()
    exact = _sampled(inputs["dy"].double(), inputs["x"].double(), rows, cols)[None]
    dense = (inputs["dy"].T @ inputs["x"])[rows, cols][None]
    limit = 2 * relative_error(dense, exact)

    def error(outputs):
        values = outputs["dense"][rows, cols] if "dense" in outputs else outputs["values"]
        return Error(relative_error(values[None], exact), limit, _MEASURE)

    return error


def _sampled(dy, x, rows, cols):
    parts = zip(rows.split(4096), cols.split(4096))
    return torch.cat([(dy[:, r] * x[:, c]).sum(0) for r, c in parts])


def _ours(inputs, *, backend):
    given = (inputs[name] for name in ("dy", "x", "rows", "cols"))
    return {"values": ops.sampled_grad(*given, backend=backend)}


def _dense(inputs):
    dense = inputs["dy"].T @ inputs["x"]
    return {"values": dense[inputs["rows"], inputs["cols"]]}


def _gathered(inputs):
    dy, x = inputs["dy"][:, inputs["rows"]], inputs["x"][:, inputs["cols"]]
    return {"values": (dy.float() * x.float()).sum(0)}
