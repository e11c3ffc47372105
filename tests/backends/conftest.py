"""What the tests of the CUDA kernels share."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from swkernels.backends import cuda

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "status.cpp"]


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """csrc/cuda compiled as C++ for the CPU's threads, see cuda_on_host/cuda_runtime.h."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed")
    path = tmp_path_factory.mktemp("cuda_on_host") / "library.so"
    subprocess.run(
        [
            *("c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas"),
            *("-Wall", "-Wextra", "-Werror", "-I", str(Path(__file__).parent / "cuda_on_host")),
            *("-x", "c++", *map(str, SOURCES), "-o", str(path)),
        ],
        check=True,
    )
    library = ctypes.CDLL(str(path))
    for name, arguments in cuda._SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    library.swk_cuda_last_error.restype = ctypes.c_char_p
    library.swk_status_text.restype = ctypes.c_char_p
    return library
