"""Put recorded super weights back into a copy of a damaged checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from swkernels.errors import InvalidInput
from swkernels.files import in_folder
from swkernels.models.checkpoint import find_checkpoint

from .contents import folder_of, look
from .findings import Hit, Verification, to_dataframe
from .manifest import NAME, Manifest
from .reading import Progress, silent
from .verify import verify

RECORD = f"repair.{NAME}"  # in the copy: what was put back


@dataclass(frozen=True)
class Repair:
    """What was put back.

    Attributes:
        source: the damaged checkpoint, which is as it was.
        output: the folder of the copy.
        restored: the super weights that were put back, with what was found in their place.
        lost: those that cannot be, as their tensor is gone or has another shape or dtype.
        after: what a verification of the copy found.
    """

    source: str
    output: str
    restored: tuple[Hit, ...]
    lost: tuple[Hit, ...]
    after: Verification
    schema: str = field(default="swkernels.repair/1", init=False)

    @property
    def ok(self) -> bool:
        """Whether the copy is intact now."""
        return self.after.ok

    def __str__(self) -> str:
        rest = "the copy is intact" if self.ok else "other damage remains"
        return f"{self.output}: {len(self.restored)} super weights put back, {rest}"

    def to_dict(self) -> dict:
        """The whole result as plain values, with ``schema`` first."""
        return {
            "schema": self.schema,
            "source": self.source,
            "output": self.output,
            "restored": [hit.to_dict() for hit in self.restored],
            "lost": [hit.to_dict() for hit in self.lost],
            "after": self.after.to_dict(),
        }

    def rows(self) -> list[dict]:
        """One flat dictionary for each super weight that was hit."""
        return [
            hit.weight.to_dict()
            | {"found_bits": hit.bits, "found_value": hit.value, "restored": hit in self.restored}
            for hit in (*self.restored, *self.lost)
        ]

    def to_dataframe(self):
        """Return ``rows()`` as a pandas DataFrame.

        Raises:
            InvalidInput: pandas is not installed.
        """
        rows = self.rows()
        return to_dataframe(rows, list(rows[0]))


def repair(
    source: str | Path,
    manifest: Manifest,
    output: str | Path,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> Repair:
    """Copy a damaged checkpoint and put its super weights back, bit by bit as they were.

    The copy is made aside, checked, and then renamed; the source is never written. Where the file
    system can share blocks between files, it does.

    Args:
        source: a safetensors file; a folder of them; or the name of a model in the local cache of
            the Hugging Face hub.
        manifest: from ``create`` or ``Manifest.load``, which has checked that it is authentic.
        output: a folder that is not there, is empty, or holds an earlier repair.
        threads, progress: as in ``verify``.

    Raises:
        InvalidInput: no super weight is damaged, none can be put back, the output is the source or
            a folder of something else, or a file changes meanwhile.
        OSError: the copy cannot be written.
    """
    path, output = find_checkpoint(source), Path(output).expanduser()
    _check_apart(path, output)
    before = verify(source, manifest, threads=threads, progress=progress)
    restored = tuple(hit for hit in before.hits if hit.bits is not None)
    lost = tuple(hit for hit in before.hits if hit.bits is None)
    if not restored:
        state = f"all {len(lost)} that are hit are" if lost else "none of those recorded is hit"
        reason = f"{state} in tensors that are gone or changed" if lost else state
        raise InvalidInput(
            f"{source} has no super weight to put back: {reason}; it is {before.status}"
        )
    results = []

    def write(made: Path) -> None:
        copied = made if path.is_dir() else made / path.name
        _copy(path, copied)
        _put_back(copied, manifest, restored)
        after = verify(copied, manifest, threads=threads, progress=progress)
        if any(hit.bits is not None for hit in after.hits):
            raise InvalidInput(f"{source} changed while it was copied: start again")
        after = replace(after, source=str(output))
        results.append(Repair(str(source), str(output), restored, lost, after))
        record = json.dumps(results[0].to_dict(), indent=1, allow_nan=False)
        (made / RECORD).write_text(record + "\n", encoding="utf-8")

    in_folder(output, RECORD, write)
    return results[0]


def _check_apart(path: Path, output: Path) -> None:
    ours, theirs = folder_of(path).resolve(), output.resolve()
    if theirs == ours or ours in theirs.parents or theirs in ours.parents:
        raise InvalidInput(
            f"the copy cannot be made in {output}, where the damaged checkpoint is: give a folder "
            "beside it"
        )
    if output.exists() and not output.is_dir():
        raise InvalidInput(f"{output} is a file: give a folder")


def _put_back(path: Path, manifest: Manifest, hits: tuple[Hit, ...]) -> None:
    known = tuple(file.name for file in manifest.files)
    entries = look(path, manifest.hash, known).entries
    for hit in hits:
        stretch = entries[hit.weight.tensor].stretch
        bits = bytes.fromhex(hit.weight.bits)
        with open(stretch.path, "r+b") as file:
            file.seek(stretch.start + hit.weight.element * len(bits))
            file.write(bits)
            file.flush()
            os.fsync(file.fileno())


def _copy(source: Path, target: Path) -> None:
    """Copy a file, or a folder without what is hidden in it; links become files."""
    if not source.is_dir():
        return _copy_file(source, target)
    hidden = shutil.ignore_patterns(".*", f"*{NAME}")
    try:
        shutil.copytree(source, target, copy_function=_copy_file, ignore=hidden, dirs_exist_ok=True)
    except shutil.Error as error:  # a list of (source, target, why), not the error of one file
        first, _, why = error.args[0][0]
        raise InvalidInput(f"cannot copy {first}: {why}") from error


def _copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file's content; blocks are shared where the file system can."""
    with open(source, "rb") as read, open(target, "wb") as written:
        try:
            while os.copy_file_range(read.fileno(), written.fileno(), 1 << 30):
                pass
        except OSError:  # between these file systems it cannot; what fails here tells why
            written.seek(0)
            read.seek(0)
            shutil.copyfileobj(read, written, 1 << 20)
