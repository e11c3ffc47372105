"""How ``swkernels tune`` shows what it does and what it found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .output import make_console


@contextmanager
def progress(total: int) -> Iterator:
    """Yield ``compiling(done, total)`` and ``finished(result)``, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True, highlight=False)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bars:
        compiled = bars.add_task("compiling", total=None)
        measured = bars.add_task("measuring", total=total)

        def compiling(done: int, binaries: int) -> None:
            bars.update(compiled, completed=done, total=binaries)

        def finished(result) -> None:
            bars.update(measured, advance=1)
            text = " ".join(cell for cell in _cells(result) if cell)
            bars.console.print(text, soft_wrap=True, markup=False)

        yield compiling, finished


def _cells(result) -> tuple[str, ...]:
    task = result.task
    shape = f"{task.rows}x{task.columns}" if task.op == "linear_absmax" else str(task.columns)
    where = task.op, shape, f"<= {task.bucket}", task.dtype
    if not result.records:
        return *where, f"none: {result.skipped}", "", "", "", ""
    best = result.records[0]
    config = " ".join(f"{name}={value}" for name, value in best["config"].items())
    seconds, library = best["seconds"], best["library_seconds"]
    times = _time(seconds), _time(library), f"{seconds / library:.2f}"
    return *where, best["variant"], config, *times


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us" if seconds < 1e-3 else f"{seconds * 1e3:.4g} ms"


def show(results: list) -> None:
    """Print what was chosen, and what was refused and why."""
    from rich.table import Table

    if not results:
        return
    console = make_console()
    chosen = Table(title="Chosen", title_justify="left")
    titles = "operation", "shape", "tokens", "dtype", "variant", "configuration", "time", "library"
    for title in (*titles, "time / library"):
        chosen.add_column(title, overflow="fold")
    for result in results:
        chosen.add_row(*_cells(result))
    console.print(chosen, markup=False)
    _show_refused(results, console)


def _show_refused(results: list, console) -> None:
    from rich.table import Table

    places: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for result in results:
        op, shape, tokens, dtype, *_ = _cells(result)
        for candidate, reason in result.refused:
            candidates = places.setdefault((op, dtype, reason), {})
            candidates.setdefault(str(candidate), []).append(f"{shape} {tokens}")
    if not places:
        return
    table = Table(title="Refused", title_justify="left", show_lines=True)
    for title in ("operation", "dtype", "why", "candidates"):
        table.add_column(title, overflow="fold")
    for cells, candidates in places.items():
        lines = (f"{name} ({', '.join(where)})" for name, where in candidates.items())
        table.add_row(*cells, "\n".join(lines))
    console.print(table, markup=False)
