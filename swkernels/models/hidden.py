"""Hidden states that wait between two layers: in host memory up to a budget, the rest in a file."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from swkernels.errors import InvalidInput


@dataclass
class _Waiting:
    """A tensor somebody holds. It is away when its bytes are in ``host`` or at ``offset``."""

    tensor: torch.Tensor
    bytes: int
    holders: int = 0
    counted: bool = False  # against the budget
    away: bool = False
    host: torch.Tensor | None = None
    offset: int | None = None  # its place in the file, for as long as it is held


class HiddenStates:
    """Keeps tensors that nobody computes with for the moment.

    A tensor keeps its identity while its memory is given back, so that frames that will go on
    with it need not know. On a GPU every waiting tensor leaves the device.

    Args:
        budget: bytes of host memory for waiting tensors.
        folder: where the file of the rest is made (it has no name there: nothing can be left
            behind); None takes the folder for temporary files.

    Attributes:
        peak: the most bytes that waited in host memory; spilled: bytes written to the file.
    """

    def __init__(self, budget: int, folder: Path | None = None):
        self.budget = budget
        self.folder = folder
        self.used = self.peak = self.spilled = 0
        self._held: dict[int, _Waiting] = {}
        self._file = None
        self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)  # places in the file by size

    def hold(self, tensor: torch.Tensor) -> None:
        """Say that ``tensor`` will be needed; its memory may be given back until ``fetch``."""
        key = _key(tensor)
        if key not in self._held:
            self._held[key] = _Waiting(tensor, tensor.untyped_storage().nbytes())
        self._held[key].holders += 1
        self.rest(tensor)

    def rest(self, tensor: torch.Tensor) -> None:
        """Give the memory of a tensor back, where it is held and the budget asks for it."""
        entry = self._held.get(_key(tensor))
        if entry is None or entry.away:
            return
        on_host = tensor.device.type == "cpu"
        if not entry.counted and self.used + entry.bytes <= self.budget:
            entry.counted = True
            self.used += entry.bytes
            self.peak = max(self.peak, self.used)
        if entry.counted:
            if not on_host:
                entry.host = torch.empty(entry.bytes, dtype=torch.uint8, pin_memory=True)
                entry.host.copy_(_bytes_of(tensor))
        elif entry.offset is None:
            self._write(entry)
        if not (entry.counted and on_host):
            tensor.untyped_storage().resize_(0)
            entry.away = True

    def fetch(self, tensor: torch.Tensor) -> None:
        """Have the values of a tensor in its memory again; one that is not held has them."""
        entry = self._held.get(_key(tensor))
        if entry is None or not entry.away:
            return
        tensor.untyped_storage().resize_(entry.bytes)
        if entry.host is not None:
            _bytes_of(tensor).copy_(entry.host)
            entry.host = None
        else:
            self._read(entry)
        entry.away = False

    @contextmanager
    def present(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """A context in which the values of tensors, held or not, are in their memory."""
        tensors = list(tensors)
        for tensor in tensors:
            self.fetch(tensor)
        try:
            yield
        finally:
            for tensor in tensors:
                self.rest(tensor)

    def release(self, tensor: torch.Tensor) -> None:
        """Take back one ``hold``. With the last one the tensor is forgotten, fetched or not."""
        key = _key(tensor)
        entry = self._held[key]
        entry.holders -= 1
        if entry.holders:
            return
        del self._held[key]
        if entry.counted:
            self.used -= entry.bytes
        if entry.offset is not None:
            self._free[entry.bytes].append(entry.offset)

    def close(self) -> None:
        """Give everything back."""
        self._held.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, entry: _Waiting) -> None:
        stored = _bytes_of(entry.tensor).cpu()
        data = _buffer(stored)
        free = self._free[entry.bytes]
        offset = free.pop() if free else self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, prefix="hidden-states-")
            done = 0
            while done < entry.bytes:
                done += os.pwrite(self._file.fileno(), data[done:], offset + done)
        except OSError as error:
            raise InvalidInput(
                f"cannot keep hidden states in {self.folder or tempfile.gettempdir()}: "
                f"{error.strerror or error} after {self._end / 1e9:.1f} GB; give a larger budget "
                "or another folder"
            ) from error
        entry.offset = offset
        self._end = max(self._end, offset + entry.bytes)
        self.spilled += entry.bytes

    def _read(self, entry: _Waiting) -> None:
        target = _bytes_of(entry.tensor)
        data = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        view, done = _buffer(data), 0
        while done < entry.bytes:
            done += os.preadv(self._file.fileno(), [view[done:]], entry.offset + done)
        if data is not target:
            target.copy_(data)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _buffer(data: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor on the CPU; a view by NumPy would keep it from being resized."""
    return memoryview((ctypes.c_char * data.numel()).from_address(data.data_ptr())).cast("B")
