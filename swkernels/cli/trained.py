"""What ``swkernels train`` shows while it trains, and what it writes and says at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .output import make_console

SCHEMA = "swkernels.train/1"
EXPORTS = ("lora", "checkpoint")


def say(text: str) -> None:
    """Print a line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


class Steps:
    """Called after each step; counts those of this process and what they took."""

    def __init__(self, show: Callable[[int, int, float], None]):
        self._show = show
        self._began = time.perf_counter()
        self._last = self._began
        self._count = 0

    def __call__(self, done: int, total: int, loss: float) -> None:
        self._last = time.perf_counter()
        self._count += 1
        self._show(done, total, loss)

    def seconds_per_step(self) -> float | None:
        """The mean; None where every step was done before an interruption."""
        return (self._last - self._began) / self._count if self._count else None


@contextmanager
def progress(total: int, state: Path) -> Iterator[Steps]:
    """Yield what a training loop calls after each step, on standard error.

    A terminal shows a bar with the loss, anything else a line for each tenth of the steps. Ctrl-C
    says how to go on.

    Args:
        total: steps.
        state: where the loop keeps its state.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    try:
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        ) as bars:  # fmt: skip
            task = bars.add_task("loss", total=total)

            def show(done: int, total: int, loss: float) -> None:
                bars.update(task, completed=done, description=f"loss {loss:.4f}")
                if not console.is_terminal and (done == total or done % max(1, total // 10) == 0):
                    say(f"step {done} of {total}: loss {loss:.4f}")

            yield Steps(show)
    except KeyboardInterrupt:
        if state.exists():
            say(f"swkernels: {state} keeps every step done: the same command with --resume goes on")
        raise


def export(handle, names: list[str], output: Path) -> list[Path]:
    """Write each export below ``output`` and return the folders."""
    from swkernels.train import to_checkpoint, to_lora

    for name in names:
        {"lora": to_lora, "checkpoint": to_checkpoint}[name](handle, output / name)
    return [output / name for name in names]


def writers(handle, document: dict) -> dict[str, Callable[[Path], None]]:
    """What writes each file; everything is rendered first, train.json is the sign of success."""
    from swkernels.files import write_atomically
    from swkernels.train.plot import loss_png

    figure = loss_png(document["losses"], document["evaluation"])
    text = json.dumps(document, indent=2) + "\n"
    return {
        "adapter.safetensors": handle.save,
        "coordinates.json": handle.coordinates.save,
        "loss.png": partial(write_atomically, data=figure),
        "train.json": partial(write_atomically, data=text.encode()),
    }


def show(document: dict, written: list[Path]) -> None:
    """Print the summary and the paths on standard output."""
    console, losses = make_console(), document["losses"]
    lines = [f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps"]
    if document["evaluation"]:
        lines.append("evaluation loss {:.4f} -> {:.4f}".format(*document["evaluation"]))
    k, matrices = document["coordinates"], document["weights"]
    lines.append(
        f"{k} value{'s' * (k > 1)} in {matrices} weight matri{'ces' if matrices > 1 else 'x'}, "
        f"largest |delta| {document['largest_delta']:.3g}"
    )
    if document["seconds_per_step"] is not None:
        lines.append(f"{document['seconds_per_step']:.3g} seconds per step")
    for line in [*lines, *map(str, written)]:
        console.print(line, soft_wrap=True, markup=False)
