"""What the commands share that measure a model: options, the yardstick, what is written and shown.

The options are typer's; each command lists those that it takes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import typer

from .inputs import load_model
from .output import OutputDirectory, make_console, stages

# The defaults shown are those of the functions, which are too heavy to import for --help.
MODEL = typer.Argument(
    metavar="MODEL", help="A directory, a .gguf file or a name on the Hugging Face hub."
)
WEIGHTS = typer.Option(
    "--weights",
    help="A scan's report.json, a file of coordinates, catalogue[:NAME], or LAYER:ROW:COLUMN "
    "(LAYER@EXPERT:ROW:COLUMN, MODULE:ROW:COLUMN). Repeatable.",
)
TEXT = typer.Option(
    help="UTF-8 text, such as wiki.test.raw of WikiText-2.",
    show_default="prose of Python's own help",
)
NO_TEXT = typer.Option("--no-text", help="Measure no perplexity, tasks alone.")
TOKENS = typer.Option(help="The first so many tokens of the text.", show_default="all")
WINDOW = typer.Option(help="Tokens of a window.", show_default="2048, or what the model takes")
STRIDE = typer.Option(help="Tokens between windows' beginnings.", show_default="the window")
BATCH_SIZE = typer.Option(help="Windows that run together.")
TASK = typer.Option(
    "--task",
    help="Multiple choice: a .jsonl file of ARC, Winogrande or {context, choices, answer}, or a "
    "Hugging Face data set NAME[:CONFIG][@SPLIT]. Repeatable.",
)
LIMIT = typer.Option(help="The first so many questions of each task.", show_default="all")
DEVICE = typer.Option(help="cpu, cuda, cuda:N or auto.", show_default="a GPU if there is one")
DTYPE = typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")
TRUST = typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
SEED = typer.Option(help="Of random draws and of the bootstrap.")
OUTPUT = typer.Option("-o", "--output", help="Folder for the result as JSON and as a figure.")
BUILT_IN_TEXT = (
    "The built-in text under-reports damage: for figures that others can compare, give --text "
    "wiki.test.raw"
)


@dataclass(frozen=True)
class Measures:
    """What to measure by, read before any model is.

    Attributes:
        words: the text; None measures no perplexity.
        source: what the text is.
        tasks: a list of ``Task``.
        most, window, stride, batch_size: of the perplexity.
        notes: what a reader of the figures should know.
    """

    words: str | None
    source: str
    tasks: list
    most: int | None
    window: int | None
    stride: int | None
    batch_size: int
    notes: tuple[str, ...] = ()

    def yardstick(self, tokenizer, stop_words: Sequence[str] = ()):
        """Return the ``Yardstick`` for a model with this tokenizer."""
        from swkernels.detect.perplexity import tokens_of
        from swkernels.evidence.yardstick import Yardstick

        tokens = None if self.words is None else tokens_of(self.words, tokenizer, self.most)
        return Yardstick(
            tokens, self.window, self.stride, self.batch_size, self.tasks, tokenizer,
            stop_words, self.source,
        )  # fmt: skip


def read_measures(
    text: Path | None,
    no_text: bool,
    tokens: int | None,
    window: int | None,
    stride: int | None,
    batch_size: int,
    task: Sequence[str] | None,
    limit: int | None,
) -> Measures:
    """Check the options and read what they name.

    Raises:
        InvalidInput: an option, a text or a task that cannot be used.
    """
    from swkernels.detect.text import DEFAULT_SOURCE, default_text, read_text
    from swkernels.errors import InvalidInput
    from swkernels.evidence.tasks import read_task

    least = {"--tokens": (tokens, 2), "--window": (window, 2), "--stride": (stride, 1)}
    least |= {"--batch-size": (batch_size, 1), "--limit": (limit, 1)}
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise InvalidInput(f"{name} must be at least {smallest}, got {value}")
    if window is not None and stride is not None and stride > window:
        raise InvalidInput(f"--stride must be at most the window of {window}, got {stride}")
    if no_text and text is not None:
        raise InvalidInput("--text and --no-text exclude each other: give one of them")
    if no_text and not task:
        raise InvalidInput("--no-text leaves nothing to measure: give a --task")
    words = None if no_text else default_text() if text is None else read_text(text)
    source = DEFAULT_SOURCE if text is None else str(text)
    tasks = [read_task(name, limit=limit) for name in task or ()]
    notes = (BUILT_IN_TEXT,) if words is not None and text is None else ()
    return Measures(words, source, tasks, tokens, window, stride, batch_size, notes)


@contextmanager
def at_work(model: str, output: Path | None, device, dtype, trust_remote_code: bool):
    """A context with the console, the folder, the progress, and a way to load the model.

    Yields (console, folder, progress, load); ``load()`` gives (model, tokenizer, fingerprint).
    Everything that can be refused before a model is loaded is.
    """
    from swkernels.detect import loading

    loading.check_device(device)
    loading.check_dtype(dtype)
    loading.source_of(model)
    console = make_console()
    with OutputDirectory(output) as folder, stages(console) as progress:

        def load():
            progress("loading the model", 0, 1)
            loaded = load_model(
                model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
            )
            progress("loading the model", 1, 1)
            return loaded

        yield console, folder, progress, load


def write(folder: OutputDirectory, result, name: str) -> None:
    """Write NAME.png and NAME.json of a ``Result`` into the folder, if there is one."""
    if folder.path is not None:
        folder.write({f"{name}.png": result.plot, f"{name}.json": result.save})


def show_rows(rows: Sequence[dict], console, title: str | None = None) -> None:
    """Print flat dictionaries as a table: numbers right, a column for each key."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for key in columns:
        numbers = any(isinstance(row.get(key), (int, float)) for row in rows)
        table.add_column(re.sub("_", " ", key), justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(cell(row.get(key))) for key in columns))
    console.print(table)


def cell(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    return str(value)


def show_paths(folder: OutputDirectory, console, lines: Sequence[str] = ()) -> None:
    """Print lines of words, then what was written."""
    say = partial(console.print, soft_wrap=True, markup=False)
    for line in [*lines, *map(str, folder.written)]:
        say(line)
