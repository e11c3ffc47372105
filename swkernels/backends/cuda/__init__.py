"""CUDA C++ for NVIDIA GPUs, built from ``csrc/cuda`` and loaded with ctypes.

It holds the operations for which CUDA C++ is meant to beat Triton; the others have no file here.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from swkernels.backends import native

_CUDA_ERROR = 7  # SWK_CUDA_ERROR
_pointer, _int, _int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "swk_cuda_column_absmax": [
        _pointer, _int, _int64, _int64, _int64, _pointer, _pointer, _int64, _pointer,
    ],
    "swk_cuda_topk_abs_count": [
        _pointer, _int64, _int64, _int, _int, _int64, _int, _int, _pointer, _pointer, _pointer,
    ],
    "swk_cuda_topk_abs_gather": [
        _pointer, _int64, _int, _int64, _int64, *[_pointer] * 5,
    ],
}  # fmt: skip


def available() -> str | None:
    """Return None if the CUDA library and a GPU are usable, else one line: what is missing."""
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm; CUDA C++ needs an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    return native.problem("cuda")


@cache
def library() -> ctypes.CDLL:
    """Return the loaded library with its signatures set.

    Raises:
        BackendUnavailable: it was not built, does not load, or is of another version.
    """
    lib = native.load("cuda")
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, _int
    lib.swk_cuda_last_error.restype, lib.swk_cuda_last_error.argtypes = ctypes.c_char_p, []
    return lib


def check(status: int, what: str) -> None:
    """Raise RuntimeError, naming the call, its shapes and the launch, unless ``status`` is 0."""
    if status == 0:
        return
    lib = library()
    reason = lib.swk_cuda_last_error() if status == _CUDA_ERROR else lib.swk_status_text(status)
    raise RuntimeError(f"{what} on CUDA: {reason.decode()}")
