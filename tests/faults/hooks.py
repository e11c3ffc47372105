"""What goes wrong inside a command: called in its process before it begins; see ``Server.run``."""

from __future__ import annotations

import errno
import os
from importlib import import_module
from pathlib import Path


def cut_off(place: str, file: str, size: str) -> None:
    """Truncate ``file`` to ``size`` bytes as the function at ``place`` returns or is entered."""
    _at(place, lambda: os.truncate(file, int(size)))


def remove(place: str, file: str) -> None:
    """Delete ``file`` at that moment."""
    _at(place, lambda: os.unlink(file))


def replace(place: str, file: str, other: str) -> None:
    """Put ``other`` in the place of ``file`` at that moment."""
    _at(place, lambda: os.replace(other, file))


def overwrite(place: str, file: str, other: str) -> None:
    """Write what ``other`` holds into ``file``, in place, at that moment."""

    def write() -> None:
        with open(file, "r+b") as stream:
            stream.write(Path(other).read_bytes())

    _at(place, write)


def full_disk(folder: str, room: str) -> None:
    """Let writing below ``folder`` fail as on a full disk once ``room`` bytes are written."""
    left = int(room)
    write = os.write

    def limited(descriptor: int, data) -> int:
        nonlocal left
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(folder):
            left -= len(data)
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    os.write = limited


def _at(place: str, happen) -> None:
    """Let something happen once: place is "after module:name" or "before module:name"."""
    when, _, path = place.partition(" ")
    module, _, name = path.partition(":")
    *owners, name = name.split(".")
    owner = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    own = getattr(owner, name)
    pending = [happen]

    def called(*arguments, **options):
        if when == "before" and pending:
            pending.pop()()
        result = own(*arguments, **options)
        if when == "after" and pending:
            pending.pop()()
        return result

    setattr(owner, name, called)
