"""``swkernels scan``: from a model's name to a table, a report, a plot and a page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .inputs import load_model, parse_size
from .output import OutputDirectory, make_console, stages

# The defaults shown are ScanConfig's, which is too heavy to import for --help; a test compares.
_MODEL = typer.Argument(
    metavar="MODEL", help="A directory, a .gguf file or a name on the Hugging Face hub."
)
_TEXT = typer.Option(help="UTF-8 text to scan over.", show_default="prose of Python's own help")
_DATASET = typer.Option(help="A .txt or .jsonl file, or a Hugging Face data set NAME[:CONFIG].")
_EVAL_TEXT = typer.Option(help="UTF-8 text to verify on.", show_default="the scanned text")
_SAMPLES = typer.Option(help="Samples to read peaks over.", show_default="8")
_LENGTH = typer.Option(help="Tokens of a sample.", show_default="512")
_BATCH_SIZE = typer.Option(help="Samples that run together.", show_default="1")
_EVAL_TOKENS = typer.Option(help="Tokens to verify on.", show_default="2048")
_DEVICE = typer.Option(help="cpu, cuda, cuda:N or auto.", show_default="a GPU if there is one")
_DTYPE = typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")
_SPECIAL_TOKENS = typer.Option(
    help="tokenizer (as it does by itself), force (a BOS before every sample) or none.",
    show_default="tokenizer",
)
_METHOD = typer.Option(
    "--method",
    help="What may name candidates: dominance, outlier, threshold. Repeatable.",
    show_default="dominance",
)
_MAX_CANDIDATES = typer.Option(help="The strongest that are kept.", show_default="16")
_NO_VERIFY = typer.Option("--no-verify", help="List candidates, measure nothing.")
_BACKEND = typer.Option(
    help="reference, cpu, triton or cuda for every operation.", show_default="the best there is"
)
_SEED = typer.Option(help="Of the null draws and the bootstrap.", show_default="42")
_RANK_TIMEOUT = typer.Option(
    help="Seconds that a process under torchrun waits for the others.", show_default="600"
)
_TRUST = typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
_STREAM = typer.Option("--stream", help="Read one layer at a time: MODEL need not fit into memory.")
_BUDGET = typer.Option(
    help="With --stream: memory for hidden states, as 8GB or 500MB; the rest waits in a file.",
    show_default="2GB",
)
_SPILL = typer.Option(help="With --stream: the folder of that file.", show_default="temporary")
_BY_LAYERS = typer.Option(
    "--by-layers", help="With --stream under torchrun: each process reads a range of the layers."
)
_OUTPUT = typer.Option(
    "-o",
    "--output",
    help="Folder for report.json, report.html, spikes.png and, of a mixture, routing.png.",
)
STATE = "scan.state"  # in the output folder
_STATE = typer.Option(
    help="File from which a scan that was ended goes on.",
    show_default="scan.state in the output folder",
)
_SAVE_EVERY = typer.Option(help="Seconds between two states.", show_default="60")
_FRESH = typer.Option("--fresh", help="Remove a state that is there and start anew.")


def scan(
    model: Annotated[str, _MODEL],
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
    rank_timeout: Annotated[float | None, _RANK_TIMEOUT] = None,
    stream: Annotated[bool, _STREAM] = False,
    budget: Annotated[str | None, _BUDGET] = None,
    spill: Annotated[Path | None, _SPILL] = None,
    by_layers: Annotated[bool, _BY_LAYERS] = False,
    trust_remote_code: Annotated[bool, _TRUST] = False,
    output: Annotated[Path | None, _OUTPUT] = None,
    state: Annotated[Path | None, _STATE] = None,
    save_every: Annotated[float | None, _SAVE_EVERY] = None,
    fresh: Annotated[bool, _FRESH] = False,
) -> None:
    """Find the super weights of MODEL and prove them by measurement.

    A scan that was ended, by Ctrl-C or worse, goes on where it was when it is started again with
    the same output folder or state.

    Under torchrun its processes share the work: torchrun --nproc-per-node N -m swkernels scan MODEL
    """
    from swkernels.detect import loading
    from swkernels.detect import ranks as together
    from swkernels.detect import scan as detection
    from swkernels.models.unchanged import Watch

    settings = {
        "samples": samples,
        "length": length,
        "batch_size": batch_size,
        "eval_tokens": eval_tokens,
        "special_tokens": special_tokens,
        "methods": tuple(methods) if methods else None,
        "max_candidates": max_candidates,
        "verify": not no_verify,
        "backend": backend,
        "seed": seed,
    }
    config = detection.ScanConfig(**{k: v for k, v in settings.items() if v is not None})
    _check_options(config, device, dtype)
    streaming = _streaming(stream, budget, spill, by_layers)
    state_options = _state_options(output, state, save_every, fresh)
    inputs, source = _inputs(text, dataset)
    eval_inputs = _read(eval_text)
    timeout = together.TIMEOUT if rank_timeout is None else rank_timeout
    with (
        together.Ranks.from_environment(timeout) as ranks,
        ranks.together("writing the report"),
    ):
        console = make_console(quiet=not ranks.first)
        if stream and ranks.size > 1 and state is None:
            state_options = None  # of a scan layer by layer one process alone keeps a state
        saved = _saved_state(state_options, stream, loading.files_of(model), console)
        output = output if ranks.first else None
        with OutputDirectory(output) as folder, stages(console) as progress:
            common = {
                "eval_inputs": eval_inputs,
                "config": config,
                "progress": progress,
                "ranks": ranks,
            }
            loading_options = {
                "device": ranks.device(device),
                "dtype": dtype,
                "trust_remote_code": trust_remote_code,
            }
            watch = Watch(loading.files_of(model))
            if stream:
                from swkernels.detect.streamed import scan_stream

                report = scan_stream(
                    model,
                    inputs,
                    text_source=source,
                    state=saved,
                    **streaming,
                    **loading_options,
                    **common,
                )
            else:
                progress("loading the model", 0, 1)
                with ranks.together("loading the model"):
                    loaded, tokenizer, fingerprint = load_model(model, **loading_options)
                progress("loading the model", 1, 1)
                if saved is not None and not ranks.first:  # maybe on a machine of its own
                    saved.path.parent.mkdir(parents=True, exist_ok=True)
                report = detection.scan(
                    loaded,
                    inputs,
                    tokenizer=tokenizer,
                    name=model,
                    fingerprint=fingerprint,
                    source=source,
                    state=saved,
                    **common,
                )
            watch.check()
            if output is not None:
                folder.write(_writers(report))
                if saved is not None:
                    saved.remove()
        _show(report.to_dict(), console, folder.written)
    if saved is not None:  # of another rank, or where nothing is written
        saved.remove()


def _check_options(config, device: str | None, dtype: str | None) -> None:
    """Refuse what ScanConfig does not, before a text or a model is read."""
    import importlib

    from swkernels import backends
    from swkernels.detect import loading
    from swkernels.detect.text import SPECIAL_TOKENS
    from swkernels.errors import BackendUnavailable, InvalidInput

    if config.special_tokens not in SPECIAL_TOKENS:
        raise InvalidInput(
            f"--special-tokens must be one of {', '.join(SPECIAL_TOKENS)}, got "
            f"{config.special_tokens!r}"
        )
    if config.max_candidates < 1:
        raise InvalidInput(f"--max-candidates must be at least 1, got {config.max_candidates}")
    loading.check_device(device)
    loading.check_dtype(dtype)
    name = backends.explicit_choice(config.backend)
    if name is not None:
        missing = importlib.import_module(f"swkernels.backends.{name}").available()
        if missing is not None:
            raise BackendUnavailable(f"backend {name!r} is not there: {missing}")


def _streaming(stream: bool, budget: str | None, spill: Path | None, by_layers: bool) -> dict:
    """The options of --stream, as ``scan_stream`` takes them.

    Raises:
        InvalidInput: one of them without --stream, or a size that is none.
    """
    from swkernels.detect.streamed import BUDGET
    from swkernels.errors import InvalidInput

    given = {"--budget": budget, "--spill": spill, "--by-layers": by_layers or None}
    alone = [name for name, value in given.items() if value is not None and not stream]
    if alone:
        raise InvalidInput(f"{alone[0]} belongs to --stream: give both or neither")
    size = BUDGET if budget is None else parse_size(budget)
    return {"budget": size, "spill": spill, "by_layers": by_layers}


def _state_options(
    output: Path | None, state: Path | None, every: float | None, fresh: bool
) -> dict | None:
    """Where and how often a scan keeps its state; None where it keeps none.

    Raises:
        InvalidInput: options that do not go together, or no number of seconds.
    """
    from swkernels.detect.state import EVERY, check_every
    from swkernels.errors import InvalidInput

    given = {"--state": state, "--save-every": every, "--fresh": fresh or None}
    named = [name for name, value in given.items() if value is not None]
    if state is None and output is None:
        if named:
            raise InvalidInput(f"{named[0]} needs a place for the state: give --state or -o")
        return None
    every = EVERY if every is None else every
    check_every(every)
    return {"path": state or output / STATE, "every": every, "fresh": fresh}


def _saved_state(options: dict | None, stream: bool, files: Path | None, console):
    """The state of these options: it speaks on the console, and of trouble on stderr."""
    from swkernels.detect.state import ScanState
    from swkernels.detect.stream_state import StreamState

    if options is None:
        return None
    kind = StreamState if stream else ScanState
    return kind(
        **options,
        files=files,
        notice=lambda line: console.print(line, soft_wrap=True, markup=False),
        warn=lambda line: print(f"swkernels: {line}", file=sys.stderr),
    )


def _inputs(text: Path | None, dataset: str | None):
    """Return the text or texts and what to call them; None for the default text."""
    from swkernels.detect.text import read_dataset
    from swkernels.errors import InvalidInput

    if text is not None and dataset is not None:
        raise InvalidInput("--text and --dataset exclude each other: give one of them")
    if dataset is not None:
        return read_dataset(dataset), dataset
    return _read(text), str(text) if text is not None else None


def _read(path: Path | None) -> str | None:
    from swkernels.detect.text import read_text

    return None if path is None else read_text(path)


def _writers(report) -> dict[str, Callable[[Path], None]]:
    """Render everything before anything is written; report.json last, as the sign of success."""
    from swkernels.detect import page, plots, routing_plot
    from swkernels.detect.mixtures import mixtures
    from swkernels.files import write_atomically

    document = report.to_dict()
    pictures = {"spikes.png": plots.spikes_png(document)}
    if mixtures(document):
        pictures["routing.png"] = routing_plot.routing_png(document)
    return {
        **{name: partial(write_atomically, data=data) for name, data in pictures.items()},
        "report.html": partial(write_atomically, data=page.render(document)),
        "report.json": report.save,
    }


def _show(document: dict, console, written: list[Path]) -> None:
    from swkernels.detect import table

    table.render(document, console)
    for path in written:
        console.print(str(path), soft_wrap=True, markup=False)
