"""Digests of bytes in chunks: the fast hash xxHash3, or SHA-256 where somebody may want to forge.

A whole is hashed by its chunks: its digest is the digest of its chunks' digests, one after the
other. Chunks can then be hashed in any order, on any thread, and nothing is hashed twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from swkernels.errors import InvalidInput

CHUNK = 1 << 20  # bytes; it fits the cache of a core, so that a chunk is hashed where it was read
HASH = "xxh3_128"
SIZES = {"xxh3_64": 8, "xxh3_128": 16, "sha256": 32}  # bytes of a digest
LARGEST_CHUNK = 1 << 30
_ALIGNMENT = 64  # no element lies in two chunks

Hasher = Callable[[object], bytes]


def hasher(name: str) -> Hasher:
    """Return the function that hashes a buffer of bytes; it lets other threads run meanwhile.

    Raises:
        InvalidInput: not one of ``SIZES``.
    """
    if name not in SIZES:
        raise InvalidInput(f"expected a hash of {', '.join(SIZES)}, got {name!r:.100}")
    if name == "sha256":
        return lambda buffer: hashlib.sha256(buffer).digest()
    import xxhash

    return getattr(xxhash, f"{name}_digest")


def check_chunk(chunk: int) -> int:
    """Return ``chunk``, a size in bytes, or raise InvalidInput."""
    if type(chunk) is not int or not 0 < chunk <= LARGEST_CHUNK or chunk % _ALIGNMENT:
        raise InvalidInput(
            f"expected chunks of a multiple of {_ALIGNMENT} bytes, at most {LARGEST_CHUNK}, got "
            f"{chunk!r:.100}"
        )
    return chunk


def chunk_count(size: int, chunk: int) -> int:
    """How many chunks ``size`` bytes have; the last one may be shorter."""
    return -(-size // chunk)


def digest_chunks(buffer, chunk: int = CHUNK, hash: str = HASH) -> bytes:
    """Return the digests of all chunks of a buffer, one after the other.

    Args:
        buffer: contiguous bytes, such as ``tensor.contiguous().view(torch.uint8).numpy()`` of a
            tensor in memory: little-endian, row by row, as in a safetensors file.
        chunk: bytes of a chunk.
        hash: one of ``SIZES``.

    Raises:
        InvalidInput: the chunk or the hash.
    """
    check_chunk(chunk)
    digest = hasher(hash)
    data = memoryview(buffer)
    if not data.nbytes:  # a shape with a zero has no form as bytes
        return b""
    data = data.cast("B")
    return b"".join(digest(data[at : at + chunk]) for at in range(0, data.nbytes, chunk))


def whole(chunks: bytes, hash: str = HASH) -> bytes:
    """Return the digest of a whole from those of its chunks."""
    return hasher(hash)(chunks)


def digest_of(chunks: bytes, number: int, hash: str = HASH) -> bytes:
    """Return the digest of chunk ``number`` from those of all."""
    return chunks[number * SIZES[hash] : (number + 1) * SIZES[hash]]
