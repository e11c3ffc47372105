"""``swkernels scan-many``: every checkpoint of a list, over Ray, with a table as results come."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from .inputs import parse_size
from .output import make_console
from .scan import (
    _BACKEND,
    _BATCH_SIZE,
    _BUDGET,
    _DATASET,
    _DEVICE,
    _DTYPE,
    _EVAL_TEXT,
    _EVAL_TOKENS,
    _LENGTH,
    _MAX_CANDIDATES,
    _METHOD,
    _NO_VERIFY,
    _SAMPLES,
    _SEED,
    _SPECIAL_TOKENS,
    _SPILL,
    _STREAM,
    _TEXT,
    _TRUST,
)

_LIST = typer.Argument(
    metavar="LIST", help="A file with a checkpoint a line, # comments, or an object of JSON a line."
)
_OUTPUT = typer.Option("-o", "--output", help="Folder for the reports and fleet.jsonl; shared.")
_ADDRESS = typer.Option(help="Of a cluster of Ray.", show_default="RAY_ADDRESS, else this machine")
_CPUS = typer.Option(help="CPU cores for a scan.")
_GPUS = typer.Option(help="GPUs for a scan; 0.5 lets two share one.")
_MEMORY = typer.Option(help="Memory that Ray sets aside for a scan, as 24GB.")
_RETRIES = typer.Option(help="How often a scan that died or lost its connection starts again.")
_TIMEOUT = typer.Option(help="Seconds for a checkpoint.", show_default="none")
_VISIBLE = 20  # rows of the live table


def scan_many(
    list_file: Annotated[Path, _LIST],
    output: Annotated[Path, _OUTPUT],
    address: Annotated[str | None, _ADDRESS] = None,
    cpus: Annotated[float, _CPUS] = 1.0,
    gpus: Annotated[float, _GPUS] = 0.0,
    memory: Annotated[str | None, _MEMORY] = None,
    retries: Annotated[int, _RETRIES] = 2,
    timeout: Annotated[float | None, _TIMEOUT] = None,
    text: Annotated[Path | None, _TEXT] = None,
    dataset: Annotated[str | None, _DATASET] = None,
    eval_text: Annotated[Path | None, _EVAL_TEXT] = None,
    samples: Annotated[int | None, _SAMPLES] = None,
    length: Annotated[int | None, _LENGTH] = None,
    batch_size: Annotated[int | None, _BATCH_SIZE] = None,
    eval_tokens: Annotated[int | None, _EVAL_TOKENS] = None,
    device: Annotated[str | None, _DEVICE] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
    special_tokens: Annotated[str | None, _SPECIAL_TOKENS] = None,
    methods: Annotated[list[str] | None, _METHOD] = None,
    max_candidates: Annotated[int | None, _MAX_CANDIDATES] = None,
    no_verify: Annotated[bool, _NO_VERIFY] = False,
    backend: Annotated[str | None, _BACKEND] = None,
    seed: Annotated[int | None, _SEED] = None,
    stream: Annotated[bool, _STREAM] = False,
    budget: Annotated[str | None, _BUDGET] = None,
    spill: Annotated[Path | None, _SPILL] = None,
    trust_remote_code: Annotated[bool, _TRUST] = False,
) -> None:
    """Scan every checkpoint of LIST, each in a process of its own, on a cluster or here.

    Started again with the same output folder it goes on: what is done is skipped. Exit code 1 if
    any scan failed.
    """
    from swkernels.integrations.fleet import Results, Task, read_list, scan_all
    from swkernels.integrations.fleet.listing import arguments
    from swkernels.integrations.fleet.results import key_of
    from swkernels.integrations.fleet.work import DONE
    from swkernels.integrations.ray import RayExecutor

    reserved = None if memory is None else parse_size(memory)
    _check(cpus, gpus, retries, timeout, reserved)
    given = locals()
    common = {name: _absolute(given[name]) for name in _names()}
    trusted = ("--trust-remote-code",) * trust_remote_code
    tasks = []
    for checkpoint in read_list(list_file):
        options = common | checkpoint.options
        if "text" in checkpoint.options or "dataset" in checkpoint.options:
            # A line's own text takes the place of the text for all, whichever kind it is.
            options |= {k: checkpoint.options.get(k) for k in ("text", "dataset")}
        model = checkpoint.model
        path = os.path.expanduser(model)
        if os.path.exists(path):
            model = os.path.abspath(path)
        extra = (*arguments(options), *trusted)
        tasks.append(
            Task(
                name=checkpoint.folder,
                model=model,
                folder=str((output / checkpoint.folder).absolute()),
                arguments=extra,
                key=key_of(model, extra),
                retries=retries,
                timeout=timeout,
            )
        )
    console = make_console()
    with (
        Results(output) as results,
        RayExecutor(address, cpus=cpus, gpus=gpus, memory=reserved) as executor,
    ):
        try:
            with _shown(console, [task.name for task in tasks]) as show:
                rows = scan_all(tasks, executor, results, show)
        finally:
            table = results.write_table([task.name for task in tasks])
    failures = [row for row in rows if row["status"] != DONE]
    console.print(f"{len(rows) - len(failures)} of {len(rows)} scanned; {table}", soft_wrap=True)
    for row in failures:
        line = f"{row['status']}: {row['name']}: {row['error']}"
        console.print(line, soft_wrap=True, markup=False)
    if failures:
        raise typer.Exit(1)


def _names() -> tuple[str, ...]:
    from swkernels.integrations.fleet.listing import OPTIONS

    return tuple(OPTIONS)


def _absolute(value):
    """A file's path as workers elsewhere need it, or the value as it is."""
    return str(value.expanduser().absolute()) if isinstance(value, Path) else value


def _check(cpus, gpus, retries, timeout, memory) -> None:
    from swkernels.errors import InvalidInput

    least = {"--cpus": cpus, "--gpus": gpus, "--retries": retries}
    for name, value in least.items():
        if not 0 <= value < float("inf"):
            raise InvalidInput(f"{name} must be at least 0, got {value}")
    above = {"--timeout": timeout, "--memory": memory}
    for name, value in above.items():
        if value is not None and not 0 < value < float("inf"):
            raise InvalidInput(f"{name} must be above 0, got {value}")


class _shown:
    """A context: ``show(name, state, result)`` in a live table on a terminal, else a line each."""

    def __init__(self, console, names: list[str]):
        self._console = console
        self._state: dict[str, tuple[str, float, dict | None]] = dict.fromkeys(
            names, ("listed", 0.0, None)
        )
        self._live = None

    def __enter__(self):
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._table, console=self._console, refresh_per_second=2
            )
            self._live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self._live is not None:
            self._live.__exit__(*error)

    def __call__(self, name: str, state: str, row: dict | None) -> None:
        self._state[name] = (state, time.monotonic(), row)
        if self._live is None and row is not None:
            seconds = f" in {row['seconds']:.1f} s" if state == "finished" else ""
            told = row.get("summary") or row.get("error") or ""
            status = state if state == "skipped" else row["status"]
            line = f"{status}{seconds if 'seconds' in row else ''}: {name}: {told}"
            self._console.print(line, soft_wrap=True, markup=False)

    def _table(self):
        from rich.markup import escape
        from rich.table import Table

        from swkernels.integrations.fleet.results import places

        table = Table("name", "state", "seconds", "super weights", "verdict")
        # What runs first, then what came last, then the rest.
        order = {"running": 0, "finished": 1, "waiting": 2, "skipped": 3, "listed": 4}
        rows = sorted(self._state.items(), key=lambda item: (order[item[1][0]], -item[1][1]))
        for name, (state, since, row) in rows[:_VISIBLE]:
            seconds = time.monotonic() - since if state == "running" else None
            if row is not None:
                seconds = row.get("seconds")
                state = state if state == "skipped" else row["status"]
            told = "" if row is None else row.get("summary") or row.get("error") or ""
            table.add_row(
                escape(name),
                state,
                "" if seconds is None else f"{seconds:.0f}",
                "" if row is None else places(row),
                escape(told[:120]),
            )
        done = sum(row is not None for _, _, row in self._state.values())
        table.caption = f"{done} of {len(self._state)} done"
        return table
