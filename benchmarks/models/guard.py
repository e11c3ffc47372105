"""The cases of ``guard_verify``: a checkpoint's files against their manifest, and just reading.

Reading is a copy of every byte into a buffer of a chunk, by as many threads, and no hash. In the
case of a cold file each call first asks the system to forget the file's pages; on a file system in
memory it cannot.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree

import torch

from benchmarks.case import Case, Error, Provider
from benchmarks.expected import Work

OP = "guard_verify"
SIZE = 1 << 30  # bytes of the file
COLUMNS = 4096
_TENSORS = 8
_MEASURE = "files that are not found intact, flips that are not found, bytes that are not read"


class _File:
    """A folder with a checkpoint of random weights and its manifest, as long as this lives."""

    def __init__(self, size: int, columns: int, seed: int):
        from safetensors.torch import save_file

        from swkernels.guard import create

        folder = tempfile.mkdtemp(prefix="swkernels-guard-")
        weakref.finalize(self, rmtree, folder, ignore_errors=True)
        self.path = Path(folder) / "model.safetensors"
        generator = torch.Generator().manual_seed(seed)
        shape = size // 2 // _TENSORS // columns, columns
        save_file(
            {
                f"model.layers.{n}.mlp.down_proj.weight": torch.randint(
                    -(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator
                ).view(torch.bfloat16)
                for n in range(_TENSORS)
            },
            self.path,
        )
        self.size = self.path.stat().st_size
        self.handle = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.handle)
        os.fsync(self.handle)  # only what is written can be forgotten
        self.manifest = create(self.path)

    def forget(self) -> None:
        os.posix_fadvise(self.handle, 0, 0, os.POSIX_FADV_DONTNEED)


def case(*, cold: bool, size: int = SIZE, columns: int = COLUMNS) -> Case:
    """A file of ``size`` bytes of bfloat16 weights, [size / 2 / 8 / columns, columns] each."""
    from swkernels.guard import verify
    from swkernels.guard.reading import default_threads, read_into

    files: list[_File] = []

    def make(seed):
        files[:] = [_File(size, columns, seed)]
        return {}

    def prepared() -> _File:
        if cold:
            files[0].forget()
        return files[0]

    def ours(inputs):
        file = prepared()
        found = verify(file.path, file.manifest)
        return {"bytes": torch.tensor(found.bytes), "intact": torch.tensor(found.ok)}

    def read(inputs):
        file = prepared()
        threads = default_threads()
        chunk = file.manifest.chunk
        buffers = [memoryview(bytearray(chunk)) for _ in range(threads)]

        def part(number):
            done = 0
            for at in range(number * chunk, file.size, threads * chunk):
                view = buffers[number][: min(chunk, file.size - at)]
                read_into(file.handle, view, at, file.path)
                done += len(view)
            return done

        with ThreadPoolExecutor(threads) as pool:
            return {"bytes": torch.tensor(sum(pool.map(part, range(threads))))}

    def hashed(inputs):
        import hashlib

        file = prepared()
        digest = hashlib.sha256()
        view = memoryview(bytearray(file.manifest.chunk))
        for at in range(0, file.size, len(view)):
            piece = view[: min(len(view), file.size - at)]
            read_into(file.handle, piece, at, file.path)
            digest.update(piece)
        return {"bytes": torch.tensor(file.size)}

    def judge(inputs):
        def error(outputs):
            file = files[0]
            wrong = int(outputs["bytes"] < file.manifest.size)
            if "intact" in outputs:
                wrong += int(not outputs["intact"])
                wrong += int(verify(file.path, _another(file.manifest)).ok)
            return Error(wrong, 0, _MEASURE)

        return error

    def providers():
        return [
            Provider("swkernels", "ours", ours),
            Provider("read", "bare", read),
            Provider("SHA-256 of the file, one thread", "eager", hashed),
        ]

    shape = {"rows": size // 2 // columns, "columns": columns}
    return Case(
        OP, ("random weights",), "cold file" if cold else "cached file", shape, "bfloat16",
        (Work(0, size, 0, "read"),), 400, make, judge, providers, seconds=30.0,
    )  # fmt: skip


def _another(manifest):
    """A manifest by which the last chunk of the last tensor is damaged."""
    from dataclasses import replace

    last = manifest.tensors[-1]
    chunks = last.chunks[:-1] + bytes([last.chunks[-1] ^ 1])
    return replace(manifest, tensors=(*manifest.tensors[:-1], replace(last, chunks=chunks)))
