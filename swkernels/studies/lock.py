"""One process at a time measures in a folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from swkernels.errors import InvalidInput

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` until the context or the process ends, however it ends.

    Raises:
        InvalidInput: another process holds it, or nothing can be written there.
    """
    path = folder / LOCK
    try:
        file = _held(path)
    except BlockingIOError as error:
        raise InvalidInput(
            f"{folder} is in use by {_holder(path)}: wait for it, or give another folder with -o"
        ) from error
    except OSError as error:
        raise InvalidInput(
            f"cannot write into {folder}: {error.strerror or error}; give another folder with -o"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: see _held
        file.close()


def _held(path: Path) -> BinaryIO:
    """The lock file, held by this process.

    The one before may remove the file between our opening and holding it: then it is no longer
    the one that others find, and another one is made.
    """
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)  # what one that was killed has left
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _holder(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(200).decode("utf-8", "replace") or "another process"
