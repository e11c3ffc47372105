"""The command ``swkernels``: scan a model, weigh the evidence, train chosen weights, quantize it.

Nothing heavy is imported before a command runs, so that ``swkernels --help`` is quick. Every error
that a user can act on is one line on standard error, with exit code 2; Ctrl-C gives 130.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from swkernels.errors import SwkernelsError

from .ablate import ablate
from .analyze import analyze
from .catalogue import catalogue, verify_catalogue
from .compare import compare
from .cut_off import mapped_files_may_shrink
from .doctor import doctor
from .evaluate import evaluate
from .guard import guard
from .output import Interrupted
from .quantize import quantize
from .rank import rank
from .scale import scale
from .scan import scan
from .scan_many import scan_many
from .study import study
from .train import train
from .tune import tune

USER_ERROR = 2
INTERRUPTED = 130

_ClickException = typer.BadParameter.__mro__[2]  # the base of every error about the command line

app = typer.Typer(
    name="swkernels",
    help="Find super weights in language models and prove them by measurement.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(scan)
app.command("scan-many")(scan_many)
app.command()(rank)
app.command()(ablate)
app.command()(scale)
app.command("eval")(evaluate)
app.command()(analyze)
app.command()(compare)
app.command()(catalogue)
app.command("verify-catalogue")(verify_catalogue)
app.command()(train)
app.command()(study)
app.command()(quantize)
app.add_typer(guard, name="guard")
app.command()(tune)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"swkernels {version('swkernels')}")
        except PackageNotFoundError:
            from swkernels import __version__

            typer.echo(f"swkernels {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main(
    arguments: Sequence[str] | None = None,
    *,
    code_of: Callable[[Exception], int | None] = lambda error: None,
) -> int:
    """Run the command with ``arguments`` (None: the process's own) and return the exit code.

    ``code_of`` may give a user's error another exit code than 2.
    """
    if not sys.stderr.isatty():
        # Libraries' progress bars have no place in a log; read when tqdm is first imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Where it is installed, transformers imports it, and it says which kernels it does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with mapped_files_may_shrink(USER_ERROR):
            code = app(arguments, prog_name="swkernels", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Interrupted as error:
        print(f"swkernels: interrupted: {error}", file=sys.stderr)
        return INTERRUPTED
    except _ClickException as error:
        return _fail(error.format_message())
    except SwkernelsError as error:
        return _fail(str(error), code_of(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", code_of(error))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _fail("out of memory: lower --batch-size or --length, or use --dtype bfloat16")
    if code == INTERRUPTED:
        print("swkernels: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError is a RuntimeError; asked by name, as torch may not be loaded here.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _fail(message: str, code: int | None = None) -> int:
    print(f"swkernels: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR if code is None else code
