"""The ceilings of the machine at hand, measured in the run that they are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.expected import Ceilings
from swkernels.timing import interleaved

_SIZES = {"cpu": (1 << 28, 1024), "cuda": (1 << 31, 8192)}  # bytes, rows of a square product
_TINY = (1 << 16, 64)
_DTYPES = ("float32", "bfloat16", "float16")


def read_once(x: torch.Tensor) -> torch.Tensor:
    """The fastest plain read of a contiguous tensor that PyTorch has: its sum as integers."""
    return x.view(torch.int64).sum()


def measure(device: torch.device, *, dry: bool = False) -> Ceilings:
    """Measure read and copy bandwidth on a large buffer and the rate of a square product.

    The products are of random numbers: zeros draw less power and run faster.
    """
    size, side = _TINY if dry else _SIZES[device.type]
    seconds = 0.01 if dry else 1.0
    source = torch.randint(1 << 20, (size // 8,), device=device)
    target = torch.empty_like(source)
    products = {name: _product(side, getattr(torch, name), device) for name in _DTYPES}
    copies = {
        "read": lambda _: read_once(source),
        "copy": lambda _: target.copy_(source),
    }
    took = interleaved(copies, device=device, seconds=seconds)
    took |= interleaved(products, device=device, seconds=seconds)
    gemm = {name: 2 * side**3 / took[name].median for name in _DTYPES}
    return Ceilings(size / took["read"].median, 2 * size / took["copy"].median, gemm)


def _product(side: int, dtype: torch.dtype, device: torch.device):
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda _: F.linear(x, weight)
