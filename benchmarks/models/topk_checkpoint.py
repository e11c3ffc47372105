"""A case of ``topk_abs``: every tensor of a checkpoint, straight from its safetensors file.

Ours opens and maps the file in every call, and so does what it is held against, which sums all
entries. Beside them, both on pages that are mapped already: mapping costs as much as reading. The
file is in the system's cache after the first call.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.case import Case, Error, Provider
from benchmarks.ceilings import read_once
from benchmarks.expected import Work
from benchmarks.models import smollm2
from swkernels import ops
from swkernels.models.checkpoint import open_checkpoint

OP = "topk_abs"
COUNT = 10_000
PROJECTION = "every tensor of its safetensors file"
_MEASURE = "entries that are not the next largest, or not what stands at their place"
_PLACE = 8 + 8 + 8 + 4  # bytes of an entry of the result


def case(path: Path | None = None, k: int = COUNT) -> Case:
    """The k largest of the checkpoint at ``path``; by default SmolLM2, float32."""
    path = path or smollm2.prepare()
    mapped: dict[str, torch.Tensor] = {}  # stays mapped after the file is closed
    with ExitStack() as stack:
        mapped |= stack.enter_context(open_checkpoint(path))
    entries = sum(tensor.numel() for tensor in mapped.values())
    size = sum(tensor.nbytes for tensor in mapped.values())
    dtype = str(next(iter(mapped.values())).dtype).removeprefix("torch.")

    def largest(tensors):
        found = ops.topk_abs(tensors, k)
        return found._asdict()

    def opened(inputs):
        with open_checkpoint(path) as checkpoint:
            return largest(list(checkpoint.values()))

    def eager(inputs):
        """Each tensor's largest, and the largest of those."""
        tops = [tensor.flatten() for tensor in mapped.values()]
        places = [flat.abs().topk(min(k, len(flat))).indices for flat in tops]
        values = torch.cat([flat[index] for flat, index in zip(tops, places)])
        return {"values": values[values.abs().topk(k).indices]}

    def read(tensors):
        return {"read": torch.stack([read_once(tensor) for tensor in tensors])}

    def opened_and_read(inputs):
        with open_checkpoint(path) as checkpoint:
            return read(checkpoint.values())

    def judge(inputs):
        magnitudes = torch.cat([tensor.flatten().abs() for tensor in mapped.values()])
        exact = magnitudes.topk(k).values.double()
        tensors = list(mapped.values())

        def error(outputs):
            if "values" not in outputs:
                return Error(0, 0, _MEASURE)
            values = outputs["values"].double()
            wrong = int((values.abs() != exact).sum())
            if "tensor" in outputs:
                places = [outputs[name].tolist() for name in ("tensor", "row", "column")]
                there = [tensors[n].view(-1, tensors[n].shape[-1])[row, column].item()
                         for n, row, column in zip(*places)]  # fmt: skip
                wrong += sum(a != b for a, b in zip(there, values.tolist()))
                wrong += k - len(set(zip(*places)))
            return Error(wrong, 0, _MEASURE)

        return error

    def providers():
        return [
            Provider("swkernels", "ours", opened),
            Provider("swkernels, the file mapped before", "ours",
                     lambda inputs: largest(list(mapped.values()))),
            Provider("read", "bare", opened_and_read),
            Provider("read, the file mapped before", "bare", lambda inputs: read(mapped.values())),
            Provider("abs().topk(k) of each, then of all", "eager", eager),
        ]  # fmt: skip

    shape = {"rows": 1, "columns": entries, "k": k}
    work = (Work(0, size, k * _PLACE, "read"),)
    return Case(
        OP, ("SmolLM2-135M",), PROJECTION, shape, dtype, work, 400, lambda seed: {}, judge,
        providers, seconds=30.0,
    )  # fmt: skip
