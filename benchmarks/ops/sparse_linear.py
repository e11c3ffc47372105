"""Cases of ``sparse_linear``: what k deltas add to a down projection's output."""

from __future__ import annotations

import torch

from benchmarks import expected
from benchmarks.case import Case, Error, Provider, compiled, normal, ours, relative_error
from benchmarks.ops.sampled_grad import _coordinates
from swkernels import ops

OP = "sparse_linear"
_MEASURE = "||y - exact|| / ||exact||"


def case(
    models, projection, tokens, rows, columns, k, dtype, device, *, interpreted=False, dry=False
):
    """One case on x [tokens, columns], y [tokens, rows] and k deltas, added in place."""

    def make(seed):
        of_row, of_column = _coordinates(seed, rows, columns, k, device)
        values = normal(seed, k, dtype="float32", device=device)
        return {
            "x": normal(seed + 1, tokens, columns, dtype=dtype, device=device),
            "y": normal(seed + 2, tokens, rows, dtype=dtype, device=device),
            "weight": normal(seed + 3, rows, columns, dtype=dtype, device=device, scale=0.02),
            "rows": of_row,
            "cols": of_column,
            "values": values,
        }

    def providers():
        return [
            Provider("F.linear of the base, for scale", "bare", _base),
            *ours(OP, _call(columns, rows), device, interpreted=interpreted),
            Provider("gathered columns, index_add", "eager", _gathered),
            Provider("the sparse matrix, torch.sparse.mm", "eager", _sparse),
            compiled(lambda: _gathered, dry=dry),
        ]

    shape = {"tokens": tokens, "columns": columns, "rows": rows, "k": k}
    work = expected.sparse_linear(tokens, rows, columns, k, dtype)
    label = f"{projection} at {k} coordinates"
    return Case(OP, models, label, shape, dtype, work, 30, make, judge, providers)


def judge(inputs):
    """At most twice as far from float64 as adding with index_add in float32."""
    exact = _gathered({**inputs, "x": inputs["x"].double(), "y": inputs["y"].double()})["y"]
    limit = 2 * relative_error(_gathered(inputs)["y"], exact)

    def error(outputs):
        if "base" in outputs:
            return Error(0.0, limit, _MEASURE)
        return Error(relative_error(outputs["y"], exact), limit, _MEASURE)

    return error


def _call(columns, rows):
    patterns: dict[int, tuple] = {}

    def call(inputs, *, backend):
        place = inputs["rows"].data_ptr()
        if place not in patterns:  # sorted once, as a layer does
            pattern, order = ops.SparsePattern.sort(inputs["rows"], inputs["cols"], (rows, columns))
            patterns[place] = pattern, inputs["values"][order]
        pattern, values = patterns[place]
        y = ops.pattern_linear(inputs["x"], inputs["y"], values, pattern, backend=backend)
        return {"y": y}

    return call


def _base(inputs):
    return {"base": torch.nn.functional.linear(inputs["x"], inputs["weight"])}


def _gathered(inputs):
    wide = torch.promote_types(inputs["x"].dtype, torch.float32)
    products = inputs["x"][:, inputs["cols"]].to(wide) * inputs["values"].to(wide)
    y = inputs["y"].to(wide).index_add(1, inputs["rows"], products)
    return {"y": y.to(inputs["y"].dtype)}


def _sparse(inputs):
    shape = inputs["y"].shape[1], inputs["x"].shape[1]
    indices = torch.stack([inputs["rows"].long(), inputs["cols"].long()])
    matrix = torch.sparse_coo_tensor(indices, inputs["values"], shape)
    product = torch.sparse.mm(matrix, inputs["x"].float().T).T
    return {"y": (inputs["y"].float() + product).to(inputs["y"].dtype)}
