"""Cases of ``quant_linear``: a linear layer over a packed weight with four outliers.

The bare work is the plain linear layer in full precision, in the types that the targets name.
Other packages keep no outliers and bitsandbytes has no int4, so each is judged by its own weight.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from benchmarks import expected, peers
from benchmarks.case import Case, Error, Provider, compiled, normal, ours, peer, relative_error
from benchmarks.ops.packed import label, packed, plain_values, tensors_of, weight
from swkernels import ops
from swkernels.backends.blocks import unpack
from swkernels.backends.plan import Code

OP = "quant_linear"
OUTLIERS = 4
_LARGE = 8.0  # their magnitude; that of the rest is 0.02
_MEASURE = "||y - exact|| / ||exact||, exact being the product with the unpacked weight"


def case(
    models, projection, tokens, rows, columns, code, block, dtype, device, *, interpreted=False,
    dry=False,
):  # fmt: skip
    """One case on x [tokens, columns] and a packed w [rows, columns]; block divides it."""
    how = rows, columns, code, block, dtype
    precisions = ("float32", "bfloat16") if device.type == "cpu" else (dtype,)
    precisions = (dtype, *(name for name in precisions if name != dtype))
    on_cuda = device.type == "cuda" and code == "int4" and dtype != "float32"
    gemlite_refusal = peers.gemlite_refusal(rows, columns, block)
    gemlite = peers.Gemlite(rows, columns, block, getattr(torch, dtype))
    with_nf4 = find_spec("bitsandbytes") is not None and block <= 4096

    def make(seed):
        w = weight(seed, rows, columns, dtype, device)
        places = _places(rows, columns, device)
        w[places[:, 0], places[:, 1]] = _LARGE
        x = normal(seed + 1, tokens, columns, dtype=dtype, device=device)
        inputs = dict(tensors_of(w, code, block, places))
        for name in precisions:
            cast = getattr(torch, name)
            inputs[f"weight {name}"] = packed(inputs, *how).dequantize(cast)
            inputs[f"x {name}"] = x.to(cast)
        w[places[:, 0], places[:, 1]] = 0
        if with_nf4:
            nf4 = tensors_of(w, "nf4", block)
            inputs |= {"nf4 codes": nf4["codes"], "nf4 scales": nf4["scales"]}
            if peers.avx512_refusal(rows, columns, block, device) is None:
                inputs |= peers.avx512_layout(nf4["codes"], nf4["scales"], rows, columns, block)
        if on_cuda and gemlite_refusal is None and find_spec("gemlite"):
            codes = unpack(inputs["codes"], Code(code), rows * columns).view(rows, columns)
            inputs |= gemlite.tensors(codes, inputs["scales"])
        return inputs

    def call(inputs, *, backend):
        return {"y": ops.quant_linear(inputs[f"x {dtype}"], packed(inputs, *how), backend=backend)}

    def plain(inputs):
        w = plain_values(inputs["codes"], inputs["scales"], code, block).view(-1)
        w[inputs["positions"]] = inputs["values"].float()
        w = w.view(rows, columns).to(inputs[f"x {dtype}"].dtype)
        return {"y": F.linear(inputs[f"x {dtype}"], w)}

    def full(name):
        """The plain layer; in another type than x's it is another product, and not judged."""

        def run(inputs):
            y = F.linear(inputs[f"x {name}"], inputs[f"weight {name}"])
            return {"y": y} if name == dtype else {}

        return Provider(f"F.linear {name}", "bare", run)

    def matmul_4bit(inputs):
        given = inputs[f"x {dtype}"], inputs["nf4 codes"], inputs["nf4 scales"]
        return {"y of nf4": peers.nf4_linear(*given, rows, block)}

    def avx512(inputs):
        y = peers.avx512_linear(inputs[f"x {dtype}"], inputs, rows, block)
        return {"y of nf4 in bfloat16": y}

    def with_gemlite(inputs):
        return {"y without outliers": gemlite.linear(inputs[f"x {dtype}"], inputs)}

    def providers():
        return [
            *(full(name) for name in precisions),
            *ours(OP, call, device, interpreted=interpreted),
            Provider("unpack, F.linear", "eager", plain),
            compiled(lambda: plain, dry=dry),
            peers.bitsandbytes("bitsandbytes matmul_4bit, nf4", matmul_4bit, "nf4", block, device),
            peer(
                "bitsandbytes Linear4bit, nf4, AVX-512 BF16", "bitsandbytes", device, avx512,
                devices=("cpu", "cuda"),
                refusal=peers.avx512_refusal(rows, columns, block, device),
            ),
            peer("gemlite", "gemlite", device, with_gemlite, refusal=gemlite_refusal),
        ]  # fmt: skip

    def judge(inputs):
        x, q = inputs[f"x {dtype}"], packed(inputs, *how)
        none = {name: inputs[name][:0] for name in ("positions", "values")}

        def nf4():
            held = {name: inputs[f"nf4 {name}"] for name in ("codes", "scales")}
            return packed(held | none, rows, columns, "nf4", block, dtype)

        judged = {  # output -> its weight, and the type that it is computed in
            "y": (lambda: q, dtype),
            "y of nf4": (nf4, dtype),
            "y of nf4 in bfloat16": (nf4, "bfloat16"),
            "y without outliers": (lambda: q.with_tensors(q.tensors() | none), dtype),
        }

        @cache
        def exact_and_limit(name):
            """The exact product, and twice the error of PyTorch's in that type."""
            weight_of, cast = judged[name]
            w = ops.block_dequantize(weight_of(), torch.float64, backend="reference")
            exact = F.linear(x.double(), w)
            cast = getattr(torch, cast)
            return exact, 2 * relative_error(F.linear(x.to(cast), w.to(cast)), exact)

        def error(outputs):
            if not outputs:
                return Error(0.0, 0.0, _MEASURE)
            ((name, y),) = outputs.items()
            exact, limit = exact_and_limit(name)
            return Error(relative_error(y, exact), limit, _MEASURE)

        return error

    shape = {"tokens": tokens, "columns": columns, "rows": rows, "block": block}
    work = expected.quant_linear(tokens, rows, columns, Code(code).bits, block, dtype)
    return Case(
        OP, models, label(projection, code, block), shape, dtype, work, 40, make, judge, providers,
        seconds=5.0, cold=("codes", "scales"),
    )  # fmt: skip


def _places(rows, columns, device):
    """Coordinates of the outliers [OUTLIERS, 2], spread over the weight."""
    steps = torch.arange(OUTLIERS, device=device)
    return torch.stack([steps * (rows // OUTLIERS), steps * (columns // OUTLIERS) + 3], 1)
