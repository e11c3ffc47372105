"""Read stretches of files at the speed of the disk: by several threads, hashed chunk by chunk.

Hashed are the system's own pages of the file: copying them first takes longer than hashing them.
Where these cannot be had, or not all of them be read, chunks are read into a buffer, which says
what is wrong.

A file that changes while it is read has no digest: its size, its time of change and what its name
stands for are compared before and after.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import local
from typing import NamedTuple

from swkernels.errors import InvalidInput

from .digests import SIZES, chunk_count, hasher
from .mapped import MappedFile

MOST_THREADS = 8  # more do not read faster, and each has a buffer of a chunk
RUN = 1 << 23  # bytes that a thread takes at once: with 1 MiB, asking for pages costs twice as much
Progress = Callable[[str, int, int], None]  # (stage, done, total), in bytes


def silent(stage: str, done: int, total: int) -> None:
    """A ``Progress`` that shows nothing."""


@dataclass(frozen=True)
class Stretch:
    """``size`` bytes of a file from ``start``."""

    path: Path
    start: int
    size: int


def default_threads() -> int:
    """As many as there are processors for this process, up to ``MOST_THREADS``."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def check_threads(threads: int | None) -> int:
    """Return the number of threads, by default ``default_threads()``, or raise InvalidInput."""
    if threads is None:
        return default_threads()
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= 1024:
        raise InvalidInput(f"expected 1 to 1024 threads, got {threads!r:.100}")
    return threads


def digest_stretches(
    stretches: Iterable[Stretch],
    *,
    chunk: int,
    hash: str,
    threads: int,
    progress: Progress = silent,
    stage: str = "hashing",
) -> list[bytes]:
    """Return the digests of the chunks of each stretch, one after the other.

    A file that is cut off just as its pages are hashed is SIGBUS, as with any file that is mapped.

    Args:
        stretches: those of one file beside each other.
        chunk: bytes of a chunk, counted from the start of the stretch.
        hash: one of ``SIZES``.
        threads: how many read and hash.
        progress: called with the bytes that are done.

    Raises:
        InvalidInput: a file cannot be read, ends early, or changes meanwhile.
    """
    stretches = list(stretches)
    total = sum(stretch.size for stretch in stretches)
    done = 0
    run = chunk * max(1, RUN // chunk)
    buffers = _Buffers(chunk)
    digest = hasher(hash)
    found = [bytearray(chunk_count(s.size, chunk) * SIZES[hash]) for s in stretches]
    progress(stage, 0, total)
    with ThreadPoolExecutor(threads) as pool:
        for path, numbers in groupby(range(len(stretches)), lambda n: stretches[n].path):
            with opened(path) as handle:
                mapped = MappedFile(handle, os.fstat(handle).st_size)
                pieces = [
                    (number, at, min(run, stretches[number].size - at))
                    for number in numbers
                    for at in range(0, stretches[number].size, run)
                ]

                def hashed(piece, handle=handle, path=path, mapped=mapped):
                    number, at, size = piece
                    here = Stretch(path, stretches[number].start + at, size)
                    views = _chunks(here, chunk, handle, mapped, buffers)
                    return piece, b"".join(map(digest, views))

                for (number, at, size), result in pool.map(hashed, pieces):
                    place = at // chunk * SIZES[hash]
                    found[number][place : place + len(result)] = result
                    done += size
                    progress(stage, done, total)
    return [bytes(digests) for digests in found]


def _chunks(
    run: Stretch, chunk: int, handle: int, mapped: MappedFile, buffers: _Buffers
) -> Iterator[memoryview]:
    """The chunks of a run, each to be used before the next is asked for."""
    with mapped.run(run.start, run.size) as pages:
        for at in range(0, run.size, chunk):
            size = min(chunk, run.size - at)
            if pages is not None:
                yield pages[at : at + size]
            else:
                view = buffers.get()[:size]
                read_into(handle, view, run.start + at, run.path)
                yield view


class _Buffers:
    """One buffer for each thread, which is used again."""

    def __init__(self, size: int):
        self._size = size
        self._local = local()

    def get(self) -> memoryview:
        if not hasattr(self._local, "view"):
            self._local.view = memoryview(bytearray(self._size))
        return self._local.view


def read_into(handle: int, view: memoryview, start: int, path: Path) -> None:
    """Fill ``view`` from byte ``start`` of an open file, or raise InvalidInput."""
    while len(view):
        try:
            got = os.preadv(handle, [view], start)
        except OSError as error:
            raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
        if got == 0:
            raise InvalidInput(f"{path} ends at byte {start}: it was cut while it was read")
        view, start = view[got:], start + got


def read_bytes(path: Path, start: int, size: int) -> bytes:
    """Return ``size`` bytes of a file from ``start``, or raise InvalidInput."""
    data = bytearray(size)
    with opened(path) as handle:
        read_into(handle, memoryview(data), start, path)
    return bytes(data)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A context with the descriptor of a file to be read; leaving it asks whether it is the same.

    Raises:
        InvalidInput: it cannot be read, is no regular file, or has changed meanwhile.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    try:
        before = _state(os.fstat(handle))
        yield handle
        if _state(os.fstat(handle)) != before:
            raise _changed(path)
        check_same(path, before)
    finally:
        os.close(handle)


class State(NamedTuple):
    """What tells whether a file has changed."""

    device: int
    inode: int
    size: int
    modified: int


def state_of(path: Path) -> State:
    """Return the state of a file now, or raise InvalidInput."""
    try:
        return _state(os.stat(path))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error


def check_same(path: Path, state: State) -> None:
    """Raise InvalidInput if a file is not in this state any more, or gone."""
    try:
        now = _state(os.stat(path))
    except FileNotFoundError as error:
        raise InvalidInput(f"{path} disappeared while it was read") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    if now != state:
        raise _changed(path)


def _changed(path: Path) -> InvalidInput:
    return InvalidInput(f"{path} changed while it was read: check it when nobody writes to it")


def _state(status: os.stat_result) -> State:
    return State(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
