"""The low-rank part of a linear layer: PyTorch's GEMMs, and dropout in C++.

The products are narrow (r columns) and PyTorch's own GEMMs run them at the bandwidth of memory;
its dropout is what is slow, see ``docs/kernels/lora.md``. The C++ is ``csrc/cpu/dropout.cpp``.
"""

from __future__ import annotations

import torch

from swkernels.backends import philox
from swkernels.backends.reference.lora_linear import Products

from . import call, refuse


def supports(x: torch.Tensor) -> str | None:
    return refuse(x)


def factors(start: int, stop: int, width: int, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """``philox.factors`` in C++."""
    out = torch.empty(stop - start, width)
    call(
        "dropout",
        out.data_ptr(),
        start,
        stop,
        width,
        seed.item(),
        philox.threshold(dropout),
        1.0 / (1.0 - dropout),
    )
    return out


lora_linear = Products(factors)
