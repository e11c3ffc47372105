"""The ceilings of the machine at hand, measured in the run that they are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.expected import Ceilings
from swkernels.timing import interleaved

# Bytes of buffers and rows of square products; the best of them is the ceiling.
_BYTES = {"cpu": (1 << 26, 1 << 28), "cuda": (1 << 29, 1 << 31)}
_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
_TINY = (1 << 16, 64)
_EMULATED_ON_CPU = "float16"  # ten times slower there, so without the largest product
_DTYPES = ("float32", "bfloat16", "float16")


def read_once(x: torch.Tensor) -> torch.Tensor:
    """The fastest plain read of a contiguous tensor that PyTorch has: its sum as integers."""
    return x.view(torch.int64).sum()


def measure(device: torch.device, *, dry: bool = False) -> Ceilings:
    """Measure read and copy bandwidth on large buffers and the rate of square products.

    A ceiling is the best over several sizes of the median over interleaved rounds. The products
    are of random numbers: zeros draw less power and run faster.
    """
    seconds = 0.01 if dry else 1.0
    read, copy = [], []
    for size in _TINY[:1] if dry else _BYTES[device.type]:
        source = torch.randint(1 << 20, (size // 8,), device=device)
        target = torch.empty_like(source)
        calls = {
            "read": lambda _, x=source: read_once(x),
            "copy": lambda _, x=source, y=target: y.copy_(x),
        }
        took = interleaved(calls, device=device, seconds=seconds)
        read.append(size / took["read"].median)
        copy.append(2 * size / took["copy"].median)
    gemm = {}
    for name in _DTYPES:
        sides = _TINY[1:] if dry else _SIDES[device.type]
        if len(sides) > 1 and device.type == "cpu" and name == _EMULATED_ON_CPU:
            sides = sides[:-1]
        calls = {str(side): _product(side, getattr(torch, name), device) for side in sides}
        took = interleaved(calls, device=device, seconds=seconds)
        gemm[name] = max(2 * side**3 / took[str(side)].median for side in sides)
    return Ceilings(max(read), max(copy), gemm)


def _product(side: int, dtype: torch.dtype, device: torch.device):
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda _: F.linear(x, weight)
