"""Keep Triton's interpreter working beside NumPy >= 2.4, and its bfloat16 that of a GPU.

Up to Triton 3.6 the interpreter turns a loop bound into a number with `int()` on a one-element
array, which NumPy 2.4 refuses (triton-lang/triton#9171, mended in 3.7). It truncates float32 to
bfloat16, which every GPU rounds to nearest even.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Mend both, once in a process. Does nothing where Triton does it itself."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7):
        _mend_loop_bounds()
    _mend_bfloat16()


def _mend_loop_bounds() -> None:
    original = interpreter._patch_lang_tensor
    if getattr(original, "mended", False):
        return

    def patch_lang_tensor(tensor, *scope):
        original(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    patch_lang_tensor.mended = True
    interpreter._patch_lang_tensor = patch_lang_tensor


def _mend_bfloat16() -> None:
    original = interpreter._convert_float
    if getattr(original, "mended", False):
        return

    def convert_float(values, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(values).view(np.uint32)
            rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
            quiet = bits >> 16 | 0x40  # NaN, whose payload must not carry into the sign
            return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16
        return original(values, source, target, rounding_mode)

    convert_float.mended = True
    interpreter._convert_float = convert_float
