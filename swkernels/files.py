"""Files and folders that are whole or as they were, and JSON that was written elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from swkernels.errors import InvalidInput


def read_json(path: str | Path):
    """Read a JSON document.

    Raises:
        InvalidInput: it is not there or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"cannot read {path} as JSON: {error}") from error


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file aside in its own folder and rename it, so that no half file is ever seen.

    Raises:
        InvalidInput: the folder is not there or cannot be written.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InvalidInput(
            f"cannot write {path}: {error.strerror or error}; give a path in a folder that is "
            "there and can be written"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except OSError as error:
        os.unlink(aside)
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        os.unlink(aside)
        raise


def in_folder(folder: Path, mark: str, write: Callable[[Path], None]) -> None:
    """Write a folder aside, beside its final place, and rename it: it is whole or as it was.

    Args:
        folder: made new with its parents, or replaced as a whole if it is empty or holds ``mark``.
        mark: a file that tells a folder of the kind that is written.
        write: called with an empty folder.

    Raises:
        InvalidInput: the folder holds something else; nothing is written.
        OSError: it cannot be made.
    """
    if folder.exists() and not (folder / mark).exists() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} is there and holds no {mark}: choose another folder")
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        made, before = work / "made", work / "before"
        try:
            made.mkdir()
            write(made)
            if folder.exists():
                os.replace(folder, before)
            try:
                os.replace(made, folder)
            except BaseException:
                if before.exists():
                    os.replace(before, folder)
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # something that is not ours lies in it
                parent.rmdir()
        raise
