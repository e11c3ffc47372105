"""What goes wrong inside a command: called in its process before it begins; see ``Server.run``."""

from __future__ import annotations

import ctypes
import os
from importlib import import_module
from pathlib import Path

_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18  # sys/mount.h
_NEW_MOUNTS = 0x20000  # sched.h: CLONE_NEWNS


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


def read_only(folder: str) -> None:
    """Make ``folder`` a read-only mount in this process alone: root is bound by it, too."""
    _own_mounts()
    _mount(folder, folder, None, _BIND)
    _mount(None, folder, None, _BIND | _REMOUNT | _READ_ONLY)


def full_disk(folder: str, size: str) -> None:
    """Mount an empty disk of ``size`` bytes at ``folder`` in this process alone."""
    _own_mounts()
    _mount("none", folder, "tmpfs", 0, f"size={size}")


def make_manifest(source: str, path: str) -> None:
    """``guard create`` without its command line."""
    from swkernels.guard import create

    create(source, chunk=64).save(path)


def _own_mounts() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "no right to mount")
    _mount("none", "/", None, _PRIVATE | _RECURSIVE)


def _mount(*arguments: str | int | None) -> None:
    """mount(2): source, target, kind, flags, options."""
    source, target, kind, flags, *options = (
        part.encode() if isinstance(part, str) else part for part in arguments
    )
    mount = ctypes.CDLL(None, use_errno=True).mount
    if mount(source, target, kind, ctypes.c_ulong(flags), *options or [None]):
        raise OSError(ctypes.get_errno(), f"cannot mount {target}")


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
