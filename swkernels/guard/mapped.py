"""The pages of a file that the system holds in memory, looked at where they are and not copied."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

_POPULATE_READ = 22  # linux/mman.h: MADV_POPULATE_READ, from Linux 5.14 on
_DONTNEED = 4  # MADV_DONTNEED


class MappedFile:
    """An open file in the address space, of which one run after the other is looked at.

    Args:
        handle: its descriptor, which may be closed as soon as this is made.
        size: bytes of the file.
    """

    def __init__(self, handle: int, size: int):
        self._bytes = self._advise = None
        if sys.platform != "linux" or not size:
            return
        try:
            self._bytes = np.frombuffer(
                mmap.mmap(handle, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ), np.uint8
            )
        except OSError:  # a file system that maps nothing, or no room for addresses
            return
        # ctypes lets other threads run while the disk is waited for; mmap.madvise would not.
        self._advise = ctypes.CDLL(None).madvise
        self._advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    @contextmanager
    def run(self, start: int, size: int) -> Iterator[memoryview | None]:
        """A context with ``size`` > 0 bytes from ``start``, all of them read; or with None.

        None: they cannot all be read in this way. To look at them without asking would be SIGBUS.
        The process holds these pages until the context is left.
        """
        if self._bytes is None or start + size > len(self._bytes):
            yield None
            return
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        pages = self._bytes.ctypes.data + first, start + size - first
        if not self._populated(*pages):
            yield None
            return
        try:
            yield memoryview(self._bytes)[start : start + size]
        finally:
            self._advise(*pages, _DONTNEED)

    def _populated(self, address: int, size: int) -> bool:
        return self._advise(address, size, _POPULATE_READ) == 0
