"""A kernel with an error, by which the run sees that compute-sanitizer works on this machine."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def error_kernel(y, n, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(y + places, 1.0, mask=places <= n)  # one too many: y has n elements
