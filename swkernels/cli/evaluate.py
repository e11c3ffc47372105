"""``swkernels eval``: the perplexity of a quantized model beside what it could have been."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import quantized
from .inputs import load_model
from .output import OutputDirectory, make_console, stages

# The defaults shown are those of swkernels.detect.perplexity; a test compares.
_MODEL = typer.Argument(
    metavar="OUT", help="What `swkernels quantize` wrote; any other model is measured by itself."
)
_AGAINST = typer.Option(
    metavar="ORIGINAL", help="The model that OUT was made of.", show_default="as OUT's report says"
)
_ALONE = typer.Option("--alone", help="Measure OUT and nothing else.")
_TEXT = typer.Option(
    help="UTF-8 text, such as wiki.test.raw of WikiText-2.",
    show_default="prose of Python's own help",
)
_TOKENS = typer.Option(help="The first so many tokens of the text.", show_default="all")
_WINDOW = typer.Option(help="Tokens of a window.", show_default="2048, or what the model takes")
_STRIDE = typer.Option(help="Tokens between windows' beginnings.", show_default="the window")
_BATCH_SIZE = typer.Option(help="Windows that run together.")
_DEVICE = typer.Option(help="cpu, cuda, cuda:N or auto.", show_default="a GPU if there is one")
_DTYPE = typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")
_TRUST = typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
_OUTPUT = typer.Option("-o", "--output", help="A JSON file, with the losses of every window.")


def evaluate(
    model: Annotated[str, _MODEL],
    against: Annotated[str | None, _AGAINST] = None,
    alone: Annotated[bool, _ALONE] = False,
    text: Annotated[Path | None, _TEXT] = None,
    tokens: Annotated[int | None, _TOKENS] = None,
    window: Annotated[int | None, _WINDOW] = None,
    stride: Annotated[int | None, _STRIDE] = None,
    batch_size: Annotated[int, _BATCH_SIZE] = 1,
    device: Annotated[str | None, _DEVICE] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
    trust_remote_code: Annotated[bool, _TRUST] = False,
    output: Annotated[Path | None, _OUTPUT] = None,
) -> None:
    """Measure the perplexity of OUT, of the model that it was made of, and of plain rounding."""
    from swkernels.detect import loading
    from swkernels.detect.perplexity import perplexity, tokens_of
    from swkernels.detect.report import encode, write_atomically
    from swkernels.detect.text import DEFAULT_SOURCE, default_text, read_text
    from swkernels.quant import quantize
    from swkernels.quant.model import size_of

    _check(tokens, window, stride, batch_size, alone, against)
    loading.check_device(device)
    loading.check_dtype(dtype)
    loading.source_of(model)
    words = default_text() if text is None else read_text(text)
    original = None if alone else against or quantized.original_of(quantized.read_source(model))
    if original is not None:
        loading.source_of(original)
    console = make_console()
    load = partial(load_model, device=device, trust_remote_code=trust_remote_code)
    results: list[tuple] = []
    with OutputDirectory(output and output.parent) as folder, stages(console) as progress:

        def measure(which: str, loaded) -> None:
            found = perplexity(
                loaded, ids, window=window, stride=stride, batch_size=batch_size,
                progress=partial(progress, which),
            )  # fmt: skip
            results.append((which, found, size_of(loaded)))

        loaded, tokenizer, _ = load(model, dtype=dtype)
        ids = tokens_of(words, tokenizer, tokens)
        config, width = quantized.config_of(loaded), str(loaded.dtype).removeprefix("torch.")
        measure(quantized.MODEL if config is None else quantized.QUANTIZED, loaded)
        del loaded  # one model at a time is in memory
        if original is not None:
            loaded, *_ = load(original, dtype=width)
            measure(quantized.ORIGINAL, loaded)
            if config is not None:
                quantize(loaded, quantized.plain(config), progress=False)
                measure(quantized.PLAIN, loaded)
        source = DEFAULT_SOURCE if text is None else str(text)
        document = quantized.comparison(model, original, config, source, len(ids), results)
        if output is not None:
            content = json.dumps(encode(document), indent=1, allow_nan=False) + "\n"
            folder.write({output.name: partial(write_atomically, content=content)})
    quantized.show_comparison(document, console, text is None, folder.written)


def _check(tokens, window, stride, batch_size, alone, against) -> None:
    """Refuse what cannot work before a text or a model is read."""
    from swkernels.errors import InvalidInput

    least = {"--tokens": (tokens, 2), "--window": (window, 2), "--stride": (stride, 1)}
    for name, (value, smallest) in (least | {"--batch-size": (batch_size, 1)}).items():
        if value is not None and value < smallest:
            raise InvalidInput(f"{name} must be at least {smallest}, got {value}")
    if window is not None and stride is not None and stride > window:
        raise InvalidInput(f"--stride must be at most the window of {window}, got {stride}")
    if alone and against is not None:
        raise InvalidInput("--alone and --against exclude each other: give one of them")
