"""C++ for x86 and any other CPU, built from ``csrc/cpu`` and loaded with ctypes.

AVX2 or AVX-512 is chosen at run time; ``SWKERNELS_CPU_ISA`` (``scalar``, ``avx2`` or ``avx512``)
chooses explicitly. Work runs on PyTorch's own OpenMP threads, ``torch.get_num_threads()`` of them.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from swkernels.backends import native
from swkernels.errors import BackendUnavailable, InvalidInput

ISAS = ("best", "scalar", "avx2", "avx512")  # in the order of enum swk_isa

# What the library calls the types of tensors (enum swk_dtype).
NUMBERS = {getattr(torch, name.removeprefix("torch.")): n for name, n in native.DTYPES.items()}

_OUT_OF_MEMORY = 6  # SWK_OUT_OF_MEMORY

_pointer, _int, _int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_float, _double = ctypes.c_float, ctypes.c_double
_SIGNATURES = {
    "swk_cpu_isa": [_int],
    "swk_cpu_column_absmax": [
        _pointer, _int, _int64, _int64, _int64, _pointer, _pointer, _int64, _int, _int,
    ],
    "swk_cpu_glu_absmax": [
        _pointer, _int64, _pointer, _int64, _pointer, _int64, _int, _int, _int64, _int64,
        _pointer, _pointer, _int64, _int, _int,
    ],
    "swk_cpu_sampled_grad": [
        _pointer, _int, _int64, _pointer, _int, _int64, _int64, _int64, _int64, _pointer,
        _pointer, _int64, _pointer, _int, _int,
    ],
    "swk_cpu_sparse_linear": [
        _pointer, _int, _int64, _pointer, _int, _int64, _int64, _int64, _int64, _pointer,
        _pointer, _pointer, _int64, _int, _int,
    ],
    "swk_cpu_masked_grad": [
        _pointer, _int, _int64, _int64, _int64, _pointer, _pointer, _int64, _float, _int, _int,
    ],
    "swk_cpu_topk_low_rank": [
        _pointer, _pointer, _pointer, _pointer, _pointer, _int64, _int64, _pointer, _pointer,
        _pointer, _int, _int,
    ],
    "swk_cpu_topk_abs": [
        _pointer, _pointer, _pointer, _pointer, _pointer, _int64, _int64, _pointer, _pointer,
        _pointer, _pointer, _int, _int,
    ],
    "swk_cpu_dropout": [
        _pointer, _int64, _int64, _int64, _int64, _int64, _float, _int, _int,
    ],
    "swk_cpu_block_quantize": [
        _pointer, _int, _int64, _int64, _int64, _int64, _int, _int, _int, _int, _double, _pointer,
        _int64, _pointer, _int64, _pointer, _int, _pointer, _pointer, _int, _int, _int,
    ],
    "swk_cpu_block_dequantize": [
        _pointer, _int64, _int64, _int64, _int64, _int, _int, _pointer, _int, _pointer, _int,
        _pointer, _pointer, _int, _int64, _int64, _int64, _pointer, _int, _int, _int,
    ],
    "swk_cpu_quant_linear": [
        _pointer, _int, _int64, _int64, _pointer, _int64, _int64, _int64, _int64, _int, _int,
        _pointer, _int, _pointer, _int, _pointer, _pointer, _int, _int64, _pointer, _pointer,
        _int, _int,
    ],
}  # fmt: skip


def available() -> str | None:
    """Return None if the CPU library is usable, else one line: what is missing."""
    return native.problem("cpu")


def isa() -> str:
    """Return the instruction set in use: "scalar", "avx2" or "avx512".

    Raises:
        BackendUnavailable: the library is not there, or ``SWKERNELS_CPU_ISA`` asks for an
            instruction set that this CPU or the build lacks.
    """
    name = _requested_isa()
    resolved = library().swk_cpu_isa(ISAS.index(name))
    if resolved == 0:
        best = ISAS[library().swk_cpu_isa(0)]
        raise BackendUnavailable(
            f"SWKERNELS_CPU_ISA={name} is more than this CPU or build has (best: {best})"
        )
    return ISAS[resolved]


@cache
def library() -> ctypes.CDLL:
    """Return the loaded library with its signatures set.

    Raises:
        BackendUnavailable: see ``available``.
    """
    lib = native.load("cpu")
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, _int
    lib.swk_cpu_set_thread_pool.argtypes, lib.swk_cpu_set_thread_pool.restype = [_pointer], None
    lib.swk_cpu_set_thread_pool(_torch_thread_pool())
    return lib


def call(name: str, *arguments) -> None:
    """Call the library's ``swk_cpu_<name>`` with the arguments, then the threads and the ISA.

    Raises:
        InvalidInput, BackendUnavailable, MemoryError: what the call reports; the keys are as they
            were.
    """
    lib = library()
    requested = ISAS.index(_requested_isa())
    status = getattr(lib, f"swk_cpu_{name}")(*arguments, torch.get_num_threads(), requested)
    if status != 0:
        isa()  # has the better words where that is what is wrong
        error = MemoryError if status == _OUT_OF_MEMORY else InvalidInput
        raise error(f"{name} on the CPU: {native.status_text(lib, status)}")


def refuse(*tensors: torch.Tensor) -> str | None:
    """Return why kernels cannot take these tensors [T, C] of one dtype, or None if they can."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"it takes CPU tensors, got {x.device}"
        if x.dtype not in NUMBERS:
            return f"it takes float32, bfloat16 and float16, got {x.dtype}"
        if x.layout != torch.strided:
            return f"it takes dense tensors, got {x.layout}"
        if x.shape[1] > 1 and x.stride(1) != 1 and x.numel():
            return f"channels must be adjacent, got strides {tuple(x.stride())}"
    return None


def address(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a tensor's data, or None (a null pointer) for None."""
    return None if tensor is None else tensor.data_ptr()


def _requested_isa() -> str:
    name = os.environ.get("SWKERNELS_CPU_ISA") or "best"
    if name not in ISAS:
        raise BackendUnavailable(f"SWKERNELS_CPU_ISA must be scalar, avx2 or avx512, got {name!r}")
    return name


def _torch_thread_pool() -> ctypes.c_void_p | None:
    """Return the entry of the OpenMP runtime that PyTorch computes with, or None.

    PyTorch's wheels carry a runtime of their own, under a name that differs between builds. A
    symbol asked of libtorch_cpu is looked up in that library and in what it was linked to, so this
    finds exactly the runtime in use, whatever other copies the process has.
    """
    directory = Path(torch.__file__).parent / "lib"
    for path in sorted(directory.glob("libtorch_cpu.*")):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, _pointer)
        except (OSError, AttributeError):
            continue
    return None
