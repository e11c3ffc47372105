"""Check a checkpoint on disk against its manifest: no tensor is loaded, every byte is read once."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from swkernels.models.checkpoint import INDEX

from .contents import Contents, Entry, look, rows_of
from .digests import chunk_count, digest_of, whole
from .findings import DAMAGED, INTACT, MOVED, Finding, Hit, Verification
from .manifest import Manifest, SuperWeight, Tensor
from .reading import Progress, check_threads, digest_stretches, read_bytes, silent
from .values import item_size, value_of


def verify(
    source: str | Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> Verification:
    """Say whether a checkpoint is intact, and where it is not.

    Tensors are known by their names, so a copy with other files, or with its tensors in another
    order, is recognised as the same weights. Where tensors have not moved, headers and the index
    must be the same byte by byte. Files of configuration and tokenizer must always be.

    Args:
        source: a safetensors file; a folder of them; or the name of a model in the local cache of
            the Hugging Face hub.
        manifest: from ``create`` or ``Manifest.load``.
        threads: that read and hash; by default one a processor, at most 8.
        progress: called with (stage, bytes done, bytes in all).

    Raises:
        InvalidInput: there is no checkpoint, or a file cannot be read or changes meanwhile.
    """
    threads = check_threads(threads)
    known = tuple(file.name for file in manifest.files)
    contents = look(source, manifest.hash, known)
    pairs = [
        (tensor, contents.entries[tensor.name])
        for tensor in manifest.tensors
        if tensor.name in contents.entries
    ]
    same = [(tensor, entry) for tensor, entry in pairs if _alike(tensor, entry)]
    # As the files have them, so that a disk reads on.
    same.sort(key=lambda pair: (pair[1].file, pair[1].stretch.start))
    listed = {file.name for file in manifest.others}
    others = {name: found for name, found in contents.others.items() if name in listed}
    digests = digest_stretches(
        [entry.stretch for _, entry in same] + list(others.values()),
        chunk=manifest.chunk,
        hash=manifest.hash,
        threads=threads,
        progress=progress,
    )
    contents.check_same()
    findings = [Finding("unreadable file", name, why) for name, why in contents.problems]
    findings += _tensors_differ(manifest, contents)
    for (tensor, entry), found in zip(same, digests):
        if found != tensor.chunks:
            findings += _damage(manifest, tensor, entry, found)
    moved = _moved(manifest, contents)
    findings += _headers_differ(manifest, contents, moved)
    found = {
        name: whole(chunks, manifest.hash) for name, chunks in zip(others, digests[len(same) :])
    }
    findings += _others_differ(manifest, contents, found, moved)
    status = DAMAGED if findings else (MOVED if moved else INTACT)
    return Verification(
        source=str(source),
        manifest=manifest.sha256,
        status=status,
        findings=tuple(findings),
        tensors=len(same),
        bytes=sum(tensor.size for tensor, _ in same),
        super_weights=len(manifest.super_weights),
    )


def _alike(tensor: Tensor, entry: Entry) -> bool:
    there = entry.dtype, entry.shape, entry.stretch.size
    return (tensor.dtype, tensor.shape, tensor.size) == there


def _tensors_differ(manifest: Manifest, contents: Contents) -> list[Finding]:
    findings = []
    for tensor in manifest.tensors:
        entry = contents.entries.get(tensor.name)
        if entry is not None and _alike(tensor, entry):
            continue
        hits = tuple(Hit(w) for w in manifest.super_weights if w.tensor == tensor.name)
        expected = f"{tensor.dtype} {list(tensor.shape)}"
        if entry is None:
            detail = f"expected {expected}, which was in {tensor.file}"
            findings.append(Finding("missing tensor", tensor.name, detail, super_weights=hits))
        else:
            detail = f"expected {expected}, found {entry.dtype} {list(entry.shape)}"
            findings.append(
                Finding("changed tensor", tensor.name, detail, entry.file, super_weights=hits)
            )
    for name, entry in contents.entries.items():
        if name not in manifest.by_name:
            detail = f"{entry.dtype} {list(entry.shape)}"
            findings.append(Finding("extra tensor", name, detail, entry.file))
    return findings


def _damage(manifest: Manifest, tensor: Tensor, entry: Entry, found: bytes) -> list[Finding]:
    """The damaged chunks of a tensor, neighbours together."""
    numbers = damaged_chunks(tensor.chunks, found, tensor.size, manifest)
    hits = _hits(manifest, tensor, entry, set(numbers))
    findings = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        chunks = [number for _, number in run]
        findings.append(describe(manifest, tensor, (chunks[0], chunks[-1]), hits, entry.file))
    return findings


def damaged_chunks(expected: bytes, found: bytes, size: int, manifest: Manifest) -> list[int]:
    """The numbers of the chunks whose digests differ.

    Args:
        expected, found: digests of all chunks, one after the other.
        size: bytes of the tensor.
    """
    return [
        number
        for number in range(chunk_count(size, manifest.chunk))
        if digest_of(expected, number, manifest.hash) != digest_of(found, number, manifest.hash)
    ]


def describe(
    manifest: Manifest,
    tensor: Tensor,
    chunks: tuple[int, int],
    hits: list[Hit],
    file: str | None = None,
) -> Finding:
    """The finding of damaged chunks of a tensor.

    Args:
        chunks: the first and the last, all between them damaged.
        hits: super weights that were hit, of which those in these chunks are taken.
        file: that holds the tensor now.
    """
    first, last = chunks
    start, stop = first * manifest.chunk, min((last + 1) * manifest.chunk, tensor.size)
    rows = rows_of(tensor.shape, tensor.size, start, stop)
    inside = tuple(hit for hit in hits if first <= chunk_of(manifest, hit.weight) <= last)
    detail = f"bytes {start} to {stop - 1} of {tensor.size}"
    if rows is not None:
        detail += f", rows {rows[0]} to {rows[1]}"
    return Finding("damaged chunks", tensor.name, detail, file, chunks, start, stop, rows, inside)


def chunk_of(manifest: Manifest, weight: SuperWeight) -> int:
    """The number of the chunk that holds a super weight."""
    return weight.element * item_size(manifest.by_name[weight.tensor].dtype) // manifest.chunk


def _hits(manifest: Manifest, tensor: Tensor, entry: Entry, damaged: set[int]) -> list[Hit]:
    hits = []
    for weight in manifest.super_weights:
        if weight.tensor != tensor.name or chunk_of(manifest, weight) not in damaged:
            continue
        size = item_size(tensor.dtype)
        bits = read_bytes(entry.stretch.path, entry.stretch.start + weight.element * size, size)
        if bits.hex() != weight.bits:
            hits.append(Hit(weight, bits.hex(), value_of(bits, tensor.dtype)))
    return hits


def _moved(manifest: Manifest, contents: Contents) -> bool:
    """Whether tensors lie in other files, or in another order, than when the manifest was made."""
    before = [(tensor.file, tensor.name) for tensor in manifest.tensors]
    now = [(entry.file, name) for name, entry in contents.entries.items()]
    return before != now and sorted(name for _, name in before) == sorted(name for _, name in now)


def _headers_differ(manifest: Manifest, contents: Contents, moved: bool) -> list[Finding]:
    if moved:
        return []  # headers say where tensors are: those of a copy may differ
    unreadable = {name for name, _ in contents.problems}
    findings = []
    for file in manifest.files:
        found = contents.headers.get(file.name)
        if found is None:
            if file.name not in unreadable:
                findings.append(Finding("missing file", file.name, f"{file.size} bytes"))
        elif found != file:
            detail = "its tensors are where they were, its header is not what it was"
            findings.append(Finding("changed header", file.name, detail))
    known = {file.name for file in manifest.files}
    for name, file in contents.headers.items():
        if name not in known:
            findings.append(Finding("extra file", name, f"{file.size} bytes"))
    return findings


def _others_differ(
    manifest: Manifest, contents: Contents, digests: dict[str, bytes], moved: bool
) -> list[Finding]:
    """What differs of the files that are hashed as a whole. One file of weights has none beside it
    that belong to it."""
    if not contents.path.is_dir():
        return []
    findings = []
    for file in manifest.others:
        if file.name == INDEX and moved:
            continue
        if file.name not in digests:
            findings.append(Finding("missing file", file.name, f"{file.size} bytes"))
        elif digests[file.name] != file.digest or contents.others[file.name].size != file.size:
            size = contents.others[file.name].size
            detail = f"{size} bytes, as before" if size == file.size else (
                f"expected {file.size} bytes, found {size}"
            )  # fmt: skip
            findings.append(Finding("changed file", file.name, detail))
    known = {file.name for file in manifest.others}
    for name, stretch in contents.others.items():
        if name not in known and not (name == INDEX and moved):
            findings.append(Finding("extra file", name, f"{stretch.size} bytes"))
    return findings
