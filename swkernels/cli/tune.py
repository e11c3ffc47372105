"""``swkernels tune``: measure launch choices on the GPU at hand and write them to a tuning file."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from . import tuned
from .output import make_console

# What is tuned unless it is said: the down projections of Llama-3-8B and -70B; and in Triton's
# interpreter, which is slow, as little as shows that the command works.
_DEFAULTS = {
    "cuda": {
        "shapes": ("4096x14336", "8192x28672"),
        "tokens": ("16", "512", "4096", "16384"),
        "dtypes": ("bfloat16",),
    },
    "cpu": {"shapes": ("24x48",), "tokens": ("16", "64"), "dtypes": ("float32",)},
}

_OP = typer.Option(
    "--op",
    help="column_absmax, glu_absmax or linear_absmax. Repeatable.",
    show_default="all of them",
)
_SHAPE = typer.Option(
    "--shape",
    help="ROWSxCOLUMNS of a down projection's weight. Repeatable.",
    show_default="those of Llama-3-8B and -70B: 4096x14336, 8192x28672",
)
_MODEL = typer.Option(
    "--model",
    help="Folder of a model, or its config.json: its down projections. Repeatable.",
)
_TOKENS = typer.Option(
    "--tokens",
    help="Rows of the activation, separated by commas; each serves its bucket.",
    show_default="16,512,4096,16384",
)
_DTYPE = typer.Option(
    "--dtype",
    help="bfloat16, float16, float32, or tfloat32 (float32 multiplied as TF32). Repeatable.",
    show_default="bfloat16",
)
_DEVICE = typer.Option(
    "--device", help="cuda, cuda:N, or cpu with TRITON_INTERPRET=1, to try the command."
)
_MINUTES = typer.Option("--minutes", help="Begin nothing new after this time.")
_OUTPUT = typer.Option(
    "-o",
    "--output",
    help="The tuning file to make or to extend.",
    show_default="$SWKERNELS_TUNING or ~/.config/swkernels/tuning, where lookups find it",
)


def tune(
    ops: Annotated[list[str] | None, _OP] = None,
    shapes: Annotated[list[str] | None, _SHAPE] = None,
    models: Annotated[list[Path] | None, _MODEL] = None,
    tokens: Annotated[str | None, _TOKENS] = None,
    dtypes: Annotated[list[str] | None, _DTYPE] = None,
    device: Annotated[str, _DEVICE] = "cuda",
    minutes: Annotated[float | None, _MINUTES] = None,
    output: Annotated[Path | None, _OUTPUT] = None,
) -> None:
    """Measure on this GPU how the Triton kernels are best launched; write a tuning file."""
    begun = time.monotonic()
    from swkernels.backends.triton.tasks import OPERATIONS, tasks
    from swkernels.errors import InvalidInput
    from swkernels.tuning import files

    if minutes is not None and not minutes > 0:
        raise InvalidInput(f"--minutes must be above 0, got {minutes}")
    where = _device(device)
    defaults = _DEFAULTS[where.type]
    weights = [_shape(text) for text in shapes or (() if models else defaults["shapes"])]
    weights += [shape for model in models or () for shape in _shapes_of(model)]
    counts = [_count(text) for text in (tokens.split(",") if tokens else defaults["tokens"])]
    planned = tasks(ops or OPERATIONS, weights, counts, dtypes or defaults["dtypes"])

    from swkernels.backends import tune as tuner  # imports Triton, as _device() found it there
    from swkernels.backends.triton.launch import names

    device_name, measured = names(where)[0], where.type == "cuda"
    path = (output or files.default_path(device_name)).expanduser()
    files.check(path, device_name, measured=measured)
    deadline = None if minutes is None else begun + 60 * minutes
    results: list[tuner.Result] = []
    try:
        with tuned.progress(len(planned)) as (compiling, finished):
            tuner.compile_ahead(planned, where, deadline=deadline, progress=compiling)
            for result in tuner.measure(planned, where, deadline=deadline):
                if result.records:
                    files.merge(
                        path, device_name, result.records, measured=measured, versions=_versions()
                    )
                results.append(result)
                finished(result)
    finally:  # after Ctrl-C too: what is finished is in the file
        tuned.show(results)
    _report(results, len(planned), path, names(where))


def _device(text: str):
    """Return the torch device to measure on.

    Raises:
        InvalidInput: the text names none of a kind that can be measured on.
        BackendUnavailable: it is not there, or Triton cannot use it.
    """
    import torch

    from swkernels.backends import triton
    from swkernels.errors import BackendUnavailable, InvalidInput

    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise InvalidInput(f"--device must be cuda, cuda:N or cpu, got {text!r}")
    device, gpus = torch.device(text), torch.cuda.device_count()
    if device.type == "cpu":
        if not triton.interpreted():
            raise BackendUnavailable(
                "--device cpu runs in Triton's interpreter and measures nothing of worth: set "
                "TRITON_INTERPRET=1 to try it, or tune on a GPU"
            )
    elif gpus <= (device.index or 0):
        raise BackendUnavailable(
            f"tuning {text} needs a GPU, PyTorch sees {gpus}: run it on the machine with the GPU "
            "(swkernels doctor shows what is there)"
        )
    elif triton.interpreted():
        raise BackendUnavailable(
            "TRITON_INTERPRET is set, so nothing would run on the GPU: unset it, or take "
            "--device cpu"
        )
    else:
        device = torch.device("cuda", device.index or 0)
    missing = triton.available()
    if missing is not None:
        raise BackendUnavailable(missing)
    return device


def _shape(text: str) -> tuple[int, int]:
    from swkernels.errors import InvalidInput

    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise InvalidInput(f"--shape must be ROWSxCOLUMNS such as 4096x14336, got {text!r}")
    return int(match[1]), int(match[2])


def _count(text: str) -> int:
    from swkernels.errors import InvalidInput

    if not text.strip().isdecimal():
        raise InvalidInput(f"--tokens must be numbers such as 16,512, got {text!r}")
    return int(text)


def _shapes_of(model: Path) -> list[tuple[int, int]]:
    """Return the shape of each different down projection of a model, without its weights."""
    from swkernels.errors import InvalidInput
    from swkernels.models import find_down_projections

    model = model.expanduser()
    if not (model.is_file() or (model / "config.json").is_file()):
        raise InvalidInput(f"--model must be a folder with a config.json, or that file: {model}")
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            skeleton = AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InvalidInput(f"cannot read the model at {model}: {error}") from error
    found = find_down_projections(skeleton)
    return list(dict.fromkeys((each.rows, each.columns) for each in found))


def _versions() -> dict[str, str]:
    import torch
    import triton

    from swkernels import __version__

    return {"swkernels": __version__, "torch": torch.__version__, "triton": triton.__version__}


def _report(results: list, planned: int, path: Path, device: tuple[str, str]) -> None:
    """Say where the records are, and whether lookups find them; fail if there are none.

    Raises:
        InvalidInput: nothing was chosen.
    """
    from swkernels import tuning
    from swkernels.errors import InvalidInput

    written = [result.task for result in results if result.records]
    late = f"time was over after {len(results)} of {planned} measurements"
    if not written:
        why = "every one was skipped or refused" if len(results) == planned else late
        raise InvalidInput(f"nothing was written: {why}; give more --minutes or other shapes")
    make_console().print(str(path), soft_wrap=True, markup=False)
    if len(results) < planned:
        print(f"swkernels: {late}; what is finished is written", file=sys.stderr)
    task, (device_name, architecture) = written[-1], device
    serving = tuning.lookup(
        task.op, device_name, task.rows, task.columns, task.tokens, task.dtype,
        architecture=architecture,
    ).source  # fmt: skip
    if Path(serving).resolve() != path.resolve():
        print(
            f"swkernels: note: lookups take these shapes from {serving}; to use what was measured, "
            f"set SWKERNELS_TUNING to {path}",
            file=sys.stderr,
        )
