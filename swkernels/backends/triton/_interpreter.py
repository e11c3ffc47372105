"""Keep Triton's interpreter working beside NumPy >= 2.4.

Up to Triton 3.6 the interpreter turns a loop bound into a number with `int()` on a one-element
array, which NumPy 2.4 refuses (triton-lang/triton#9171, mended in 3.7).
"""

from __future__ import annotations

import triton
from triton.runtime import interpreter


def mend() -> None:
    """Let the interpreter's scalars be loop bounds. Does nothing where Triton does it itself."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    original = interpreter._patch_lang_tensor
    if version >= (3, 7) or getattr(original, "mended", False):
        return

    def patch_lang_tensor(tensor, *scope):
        original(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    patch_lang_tensor.mended = True
    interpreter._patch_lang_tensor = patch_lang_tensor
