"""The compiled libraries: where they lie, how they are loaded, why one may be missing.

``setup.py`` puts ``libswkernels_cpu`` and ``libswkernels_cuda`` into ``swkernels/_native`` where it
could build them, and a record of what it did, ``build.json``. ``csrc/swkernels.h`` is their
interface.
"""

from __future__ import annotations

import ctypes
import json
import sys
from functools import cache
from pathlib import Path

from swkernels.errors import BackendUnavailable

INTERFACE_VERSION = 5  # SWK_INTERFACE_VERSION in csrc/swkernels.h

DIRECTORY = Path(__file__).parents[1] / "_native"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

DTYPES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}  # enum swk_dtype


def build_record() -> dict:
    """Return what the build did, for each of "cpu" and "cuda"; empty where nothing is recorded.

    An entry holds "built" (bool), "reason" (why not, or None), "compiler", "command" and "seconds".
    """
    try:
        return json.loads((DIRECTORY / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


@cache
def load(name: str) -> ctypes.CDLL:
    """Load ``libswkernels_<name>``.

    Raises:
        BackendUnavailable: it was not built, does not load, or is of another version.
    """
    path = DIRECTORY / f"libswkernels_{name}{SUFFIX}"
    if not path.exists():
        reason = build_record().get(name, {}).get("reason") or "there is no record of a build"
        raise BackendUnavailable(
            f"the {name} library was not built: {reason}; once that is mended, install again"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"the {name} library does not load: {error}") from error
    library.swk_interface_version.restype = ctypes.c_int
    version = library.swk_interface_version()
    if version != INTERFACE_VERSION:
        raise BackendUnavailable(
            f"the {name} library has interface {version}, this package needs "
            f"{INTERFACE_VERSION}: install again"
        )
    library.swk_status_text.argtypes = [ctypes.c_int]
    library.swk_status_text.restype = ctypes.c_char_p
    return library


@cache
def problem(name: str) -> str | None:
    """Return why ``load(name)`` fails, or None where it does not."""
    try:
        load(name)
    except BackendUnavailable as error:
        return str(error)
    return None


def status_text(library: ctypes.CDLL, status: int) -> str:
    """Return the library's own words for a status."""
    return library.swk_status_text(status).decode()
