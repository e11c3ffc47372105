"""Cases of ``topk_low_rank``: the largest entries of LoRA updates, over many modules."""

from __future__ import annotations

import torch

from benchmarks import expected
from benchmarks.case import Case, Error, Provider, compiled, normal, ours
from swkernels import ops

OP = "topk_low_rank"
RANK, COUNT = 8, 1000
_MEASURE = "entries that are not those of float64"


def case(models, width, modules, dtype, device, *, interpreted=False, dry=False):
    """One case on `modules` products of B [width, r] and A [r, width], k = 1,000 (dry: 20)."""
    k = 20 if dry else COUNT

    def make(seed):
        return {
            "B": normal(seed, modules, width, RANK, dtype=dtype, device=device),
            "A": normal(seed + 1, modules, RANK, width, dtype=dtype, device=device),
        }

    def call(inputs, *, backend):
        found = ops.topk_low_rank(list(zip(inputs["B"], inputs["A"])), k, backend=backend)
        return {"places": (found.tensor * width + found.row) * width + found.column}

    def one_by_one(largest):
        """Each product is built, and its k largest go on."""

        def run(inputs):
            found = [largest(B, A) for B, A in zip(inputs["B"], inputs["A"])]
            best = torch.cat([values for values, _ in found]).topk(k).indices
            places = [place + n * width * width for n, (_, place) in enumerate(found)]
            return {"places": torch.cat(places)[best]}

        return run

    def largest(B, A, count=k):
        return (B @ A).abs().flatten().topk(count)

    def providers():
        return [
            *ours(OP, call, device, interpreted=interpreted),
            Provider("materialise, topk", "eager", one_by_one(largest)),
            compiled(lambda: largest, dry=dry, around=one_by_one),
        ]

    def judge(inputs):
        """The k largest by float64, among twice as many by float32 of each product."""
        places, values = [], []
        for number, (B, A) in enumerate(zip(inputs["B"], inputs["A"])):
            near = largest(B.float(), A.float(), min(2 * k, width * width)).indices
            rows = B.double()[near // width]
            values.append((rows * A.double().T[near % width]).sum(1).abs())
            places.append(near + number * width * width)
        exact = set(torch.cat(places)[torch.cat(values).topk(k).indices].tolist())

        def error(outputs):
            return Error(len(exact - set(outputs["places"].tolist())), 2, _MEASURE)

        return error

    shape = {"tokens": modules, "columns": width, "rows": width, "k": k}
    work = expected.topk_low_rank(modules, width, RANK, k, dtype)
    label = f"B A of {modules} modules, r = {RANK}, k = {k}"
    return Case(OP, models, label, shape, dtype, work, 60, make, judge, providers, seconds=20.0)
