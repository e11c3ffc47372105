"""Whether the files of a checkpoint stayed as they were while something read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swkernels.errors import InvalidInput


class Watch:
    """The state of files of weights, to see later whether they are as they were.

    What tells is each file's size, time of change and place on the disk: one that was written to,
    cut off, replaced, added or removed. A model on the CPU may go on reading its files as long as
    it lives: its weights are the files' own pages, where they have the dtype of the files.

    Args:
        path: a file, or a folder of .safetensors files; None looks at nothing.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._before = _stamps(path)

    def check(self) -> None:
        """Raise InvalidInput where a file changed: what was read may be of two states."""
        before, after = self._before, _stamps(self._path)
        different = sorted(name for name in before | after if before.get(name) != after.get(name))
        if different:
            state = "removed" if different[0] not in after else "changed"
            raise InvalidInput(
                f"{different[0]} was {state} while it was read: let nothing write to the "
                "checkpoint, and start again"
            )


@contextmanager
def unchanged(path: Path | None) -> Iterator[None]:
    """A context in which files are not to change; an error within it goes its own way.

    Args:
        path: of ``Watch``.

    Raises:
        InvalidInput: as ``Watch.check`` does, on leaving.
    """
    watch = Watch(path)
    yield
    watch.check()


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
