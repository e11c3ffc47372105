"""Whether the files of a checkpoint stayed as they were while something read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swkernels.errors import InvalidInput


@contextmanager
def unchanged(path: Path | None) -> Iterator[None]:
    """A context in which the weights in files are not to change; leaving it looks whether they did.

    What tells is each file's size, time of change and place on the disk: one that was written to,
    cut off, replaced, added or removed. An error within the context goes its own way.

    Args:
        path: a file, or a folder of .safetensors files; None looks at nothing.

    Raises:
        InvalidInput: a file changed, so that what was read may be of two states.
    """
    before = _stamps(path)
    yield
    after = _stamps(path)
    different = sorted(name for name in before | after if before.get(name) != after.get(name))
    if different:
        state = "removed" if different[0] not in after else "changed"
        raise InvalidInput(
            f"{different[0]} was {state} while it was read: let nothing write to the checkpoint, "
            "and start again"
        )


def _stamps(path: Path | None) -> dict[Path, tuple[int, ...]]:
    if path is None:
        return {}
    found = {}
    for file in path.glob("*.safetensors") if path.is_dir() else [path]:
        try:
            state = file.stat()
        except OSError:
            continue
        found[file] = state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
    return found
