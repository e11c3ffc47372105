"""What the cases of packed weights share."""

from __future__ import annotations

import torch

from benchmarks.case import Tensors, normal
from swkernels import ops
from swkernels.backends.plan import NF4, Code, Plan
from swkernels.ops.quantized import QuantizedTensor


def label(projection: str, code: str, block: int) -> str:
    """A projection and how it is packed, as it stands in the records."""
    return f"{projection}, {code}, blocks of {block}"


def weight(seed: int, rows: int, columns: int, dtype: str, device: torch.device) -> torch.Tensor:
    """A random weight of the size that trained ones have."""
    return normal(seed, rows, columns, dtype=dtype, device=device, scale=0.02)


def tensors_of(w: torch.Tensor, code: str, block: int, outliers=None) -> Tensors:
    """The tensors of ``w`` [D, H] in packed form."""
    return ops.block_quantize(w, code=code, block_size=block, outliers=outliers).tensors()


def packed(tensors: Tensors, rows: int, columns: int, code: str, block: int, dtype: str):
    """The packed matrix that ``tensors_of`` took apart."""
    plan = Plan(rows, columns, (0, block), Code(code))
    held = (tensors[name] for name in ("codes", "scales"))
    kept = (tensors[name] for name in ("positions", "values"))
    return QuantizedTensor((rows, columns), getattr(torch, dtype), plan, *held, None, *kept)


def plain_codes(w: torch.Tensor, code: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as one computes them in PyTorch."""
    blocks = w.float().view(-1, block)
    magnitude = blocks.abs().amax(1, keepdim=True)
    if code == "nf4":
        table = torch.tensor(NF4, device=w.device)
        middles = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(blocks * (1 / magnitude), middles, out_int32=True).to(torch.uint8)
        return _halves(codes), magnitude.view(-1)
    scales = magnitude / (7 if code == "int4" else 127)
    codes = (blocks * (1 / scales)).round()
    if code == "int8":
        return codes.to(torch.int8).view(torch.uint8).view(-1), scales.view(-1)
    return _halves((codes + 8).to(torch.uint8)), scales.view(-1)


def _halves(codes: torch.Tensor) -> torch.Tensor:
    codes = codes.view(-1)
    return codes[::2] << 4 | codes[1::2]


def plain_values(codes: torch.Tensor, scales: torch.Tensor, code: str, block: int) -> torch.Tensor:
    """The values [blocks, block] of codes, as one computes them in PyTorch."""
    if code == "int8":
        whole = codes.view(torch.int8).float()
    else:
        halves = torch.stack([codes >> 4, codes & 15], 1)
        if code == "nf4":
            whole = torch.tensor(NF4, device=codes.device)[halves.int()]
        else:
            whole = halves.float() - 8
    return whole.view(-1, block) * scales[:, None]
