"""Where a command writes: the console, and a folder that is complete or as it was."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LOG_WIDTH = 120  # columns of a table in a file or a pipe, where there is no terminal to ask


class Interrupted(Exception):
    """Ctrl-C, where there is something to say about it: what is kept."""


def make_console(quiet: bool = False):
    """Return the console on standard output; a quiet one prints nothing."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _LOG_WIDTH
    return Console(highlight=False, width=width, quiet=quiet)


@contextmanager
def stages(console) -> Iterator:
    """Yield ``progress(stage, done, total)``: a bar a stage on a terminal, else a line a stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    ) as bars:
        tasks: dict[str, int] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
                if not console.is_terminal:
                    console.print(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


class OutputDirectory:
    """A context in which a folder is there and can be written.

    Entering makes the folder and proves that files can be made in it, before any long work.
    Leaving with an error removes the files that were new and the folders that were made here.

    Args:
        path: the folder, or None: nothing is made.

    Raises:
        InvalidInput: it cannot be made or written.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.written: list[Path] = []
        self._new: list[Path] = []
        self._made: list[Path] = []

    def __enter__(self) -> OutputDirectory:
        from swkernels.errors import InvalidInput

        if self.path is None:
            return self
        try:
            missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                self._made.append(folder)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            self._undo()
            raise InvalidInput(
                f"cannot write into {self.path}: {error.strerror or error}; give another --output"
            ) from error
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            self._undo()

    def write(self, writers: dict[str, Callable[[Path], None]]) -> None:
        """Call each writer, which must leave a whole file or none, with the path of its name."""
        for name, write in writers.items():
            path = self.path / name
            if not path.exists():
                self._new.append(path)
            write(path)
            self.written.append(path)

    def _undo(self) -> None:
        for path in self._new:
            path.unlink(missing_ok=True)
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:
                return  # something that is not ours lies in it
