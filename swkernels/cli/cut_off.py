"""One line, and exit code 2, where a mapped file was cut off under a command that reads it.

Libraries map files of weights into memory. Where such a file is truncated meanwhile, or its disk
fails, looking at the lost part is no error that Python could raise: the system sends SIGBUS, of
which a process dies without a word.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_MESSAGE = (
    b"swkernels: error: a file that was being read was cut off, or its disk failed: restore the "
    b"file, let nothing write to it, and start again\n"
)


@contextmanager
def mapped_files_may_shrink(code: int) -> Iterator[None]:
    """A context in which SIGBUS says what it means and ends the process with ``code``.

    It ends at once: the failing instruction cannot be left in another way. So what a command was
    writing stays aside, under a name that begins with a dot, as when it is killed.
    """
    bus = getattr(signal, "SIGBUS", None)
    if bus is None:  # Windows does not let a mapped file be cut off
        yield
        return

    first = threading.Lock()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def say_and_end(_):
        if not first.acquire(blocking=False):
            first.acquire()  # another thread that reads the file is ending the process
        os.write(2, _MESSAGE)
        os._exit(code)

    # A handler of Python's own would run after the failing instruction: never.
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = install(bus, ctypes.cast(say_and_end, ctypes.c_void_p))
    try:
        yield
    finally:
        install(bus, before)
