"""``swkernels eval``: perplexity and multiple choice, of a quantized model beside its original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import measuring, quantized
from .inputs import load_model

_MODEL = typer.Argument(
    metavar="MODEL",
    help="A directory, a .gguf file or a name on the Hugging Face hub. What `swkernels quantize` "
    "wrote is measured beside its original and plain rounding.",
)
_AGAINST = typer.Option(
    metavar="ORIGINAL",
    help="A model to compare with.",
    show_default="of a quantized model, the one that its report names",
)
_ALONE = typer.Option("--alone", help="Measure MODEL and nothing else.")
_ROLLING = typer.Option(
    "--rolling", help="Predict every token, in the windows of lm-eval's rolling log-likelihood."
)
_LM_EVAL = typer.Option(
    "--lm-eval",
    metavar="TASKS",
    help="Tasks of EleutherAI's lm-eval too, with commas between them (needs that library).",
)
_OUTPUT = typer.Option("-o", "--output", help="A JSON file, with the losses of every window.")


def evaluate(
    model: Annotated[str, _MODEL],
    against: Annotated[str | None, _AGAINST] = None,
    alone: Annotated[bool, _ALONE] = False,
    text: Annotated[Path | None, measuring.TEXT] = None,
    no_text: Annotated[bool, measuring.NO_TEXT] = False,
    tokens: Annotated[int | None, measuring.TOKENS] = None,
    window: Annotated[int | None, measuring.WINDOW] = None,
    stride: Annotated[int | None, measuring.STRIDE] = None,
    rolling: Annotated[bool, _ROLLING] = False,
    batch_size: Annotated[int, measuring.BATCH_SIZE] = 1,
    task: Annotated[list[str] | None, measuring.TASK] = None,
    limit: Annotated[int | None, measuring.LIMIT] = None,
    lm_eval: Annotated[str | None, _LM_EVAL] = None,
    device: Annotated[str | None, measuring.DEVICE] = None,
    dtype: Annotated[str | None, measuring.DTYPE] = None,
    trust_remote_code: Annotated[bool, measuring.TRUST] = False,
    output: Annotated[Path | None, _OUTPUT] = None,
) -> None:
    """Measure MODEL: perplexity on a text, accuracy on tasks, beside the original's."""
    from swkernels.detect import loading
    from swkernels.detect.perplexity import prefix_of
    from swkernels.errors import InvalidInput
    from swkernels.evidence.evaluate import evaluate as run
    from swkernels.integrations import lm_eval as bridge
    from swkernels.quant import quantize

    if alone and against is not None:
        raise InvalidInput("--alone and --against exclude each other: give one of them")
    if rolling and no_text:
        raise InvalidInput("--rolling and --no-text exclude each other: give one of them")
    harness = bridge.tasks_of(lm_eval) if lm_eval is not None else None
    only_harness = no_text and text is None and not task and harness is not None
    measures = measuring.read_measures(
        text, no_text and not only_harness, tokens, window, stride, batch_size, task, limit
    )
    loading.source_of(model)
    original = None if alone else against or quantized.original_of(quantized.read_source(model))
    if original is not None:
        loading.source_of(original)
    whole = measures.words if rolling and tokens is None else None
    found, harness_figures = [], {}
    folder = output and output.parent
    work = measuring.at_work(model, folder, device, dtype, trust_remote_code)
    with work as (console, folder, progress, load):

        def measure(which: str, loaded) -> None:
            def show(stage: str, done: int, total: int) -> None:
                progress(f"{which}: {stage}", done, total)

            found.append(run(loaded, yardstick, which=which, name=model, text=whole, progress=show))
            if harness is not None:
                show("lm-eval", 0, 1)
                harness_figures[which] = bridge.figures(
                    bridge.lm_eval(loaded, tokenizer, harness, limit=limit, batch_size=batch_size)
                )
                show("lm-eval", 1, 1)

        loaded, tokenizer, _ = load()
        yardstick = None if only_harness else measures.yardstick(tokenizer)
        if rolling:
            yardstick = replace(yardstick, prefix=prefix_of(tokenizer))
        config, width = quantized.config_of(loaded), str(loaded.dtype).removeprefix("torch.")
        measure(quantized.MODEL if config is None else quantized.QUANTIZED, loaded)
        del loaded  # one model at a time is in memory
        if original is not None:
            loaded, *_ = load_model(
                original, device=device, dtype=width, trust_remote_code=trust_remote_code
            )
            measure(quantized.ORIGINAL, loaded)
            if config is not None:
                quantize(loaded, quantized.plain(config), progress=False)
                measure(quantized.PLAIN, loaded)
        details = {"original": original, "config": config and config.to_dict()}
        result = replace(
            found[0].beside(*found[1:], against=original and quantized.ORIGINAL),
            details=details | ({"lm_eval": harness_figures} if harness is not None else {}),
        )
        if output is not None:
            folder.write({output.name: result.save})
    for table in _tables(result, harness_figures):
        console.print(table)
    measuring.show_paths(folder, console, [*_lines(result), *measures.notes])


def _tables(result, harness_figures: dict) -> Iterator:
    """What was found: perplexities, then accuracies, then lm-eval's figures."""
    yield _perplexities(result)
    if result.scores.choices:
        yield _accuracies(result)
    if harness_figures:
        yield _of_harness(harness_figures)


def _table(titles: Sequence[str], left: int):
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < left else "right")
    return table


def _perplexities(result):
    """One row a model; without a text, its size alone."""
    document = result.to_dict()
    measured, compared = result.scores.perplexity is not None, result.against is not None
    by_text = list(result.conditions[0].by_text or {})
    titles = ["perplexity", "95 %", *(["x original"] if compared else [])] if measured else []
    titles += [name.replace("_", " ") for name in by_text]
    table = _table(["", *titles, "size"], left=1)
    for entry in document["results"]:
        cells = []
        if measured:
            cells = [_with_error(entry["perplexity"], entry["error"]), _range(entry["interval"])]
            cells += [_with_error(entry["ratio"], entry["ratio_error"])] if compared else []
        cells += [f"{entry[name]:.5g}" for name in by_text]
        table.add_row(entry["which"], *cells, f"{entry['bytes'] / 1e6:,.1f} MB")
    return table


def _accuracies(result):
    """One row for each task, rule and model."""
    titles = ["task", "rule", "", "accuracy", "95 %"]
    compared = result.against is not None
    table = _table(titles + ["- original", "95 %"] * compared, left=3)
    rows = [row for row in result.rows() if row["rule"] is not None]
    rules = list(dict.fromkeys((row["measure"], row["rule"]) for row in rows))
    for row in sorted(rows, key=lambda row: rules.index((row["measure"], row["rule"]))):
        cells = [f"{row['value']:.2%}", _range((row["low"], row["high"]), ".2%")]
        if compared:
            difference = row["compared_low"], row["compared_high"]
            cells += [f"{row['compared']:+.2%}", _range(difference, "+.2%")]
        table.add_row(row["measure"], row["rule"], row["which"], *cells)
    return table


def _of_harness(harness_figures: dict):
    """One row for each task, metric and model, as lm-eval names them."""
    table = _table(["lm-eval", "metric", "", "value"], left=3)
    for task, metrics in next(iter(harness_figures.values()))["results"].items():
        for metric in metrics:
            name, _, filtered = metric.partition(",")
            if not filtered or name.endswith("_stderr"):
                continue
            for which, of_model in harness_figures.items():
                found = of_model["results"][task]
                error = found.get(f"{name}_stderr,{filtered}")
                error = error if isinstance(error, float) and math.isfinite(error) else None
                value = found[metric]
                shown = _with_error(value, error) if isinstance(value, float) else str(value)
                table.add_row(task, metric, which, shown)
    return table


def _lines(result) -> list[str]:
    """What was measured, and what a reader should know of it."""
    lines, found = [], result.scores.perplexity
    if found is not None:
        lines.append(
            f"{sum(found.tokens)} predicted tokens of {result.measures['text']}, in "
            f"{len(found.tokens)} windows of {found.window}"
            + ("" if found.prefix is None else ", rolling as in lm-eval")
        )
    for condition in result.conditions:
        scores = condition.scores
        parts = {} if scores.perplexity is None else {"windows": scores.perplexity}
        parts |= {f"questions of {name}": choices for name, choices in scores.choices.items()}
        lines += [
            f"{condition.which}: {part.not_finite} {what} have a loss that is not finite"
            for what, part in parts.items()
            if part.not_finite
        ]
    if result.details["config"] is not None and result.details["original"] is None:
        lines.append("alone: the original is not known or not there; --against names it")
    return lines


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5g}" if error is None else f"{value:.5g} ± {error:.2g}"


def _range(interval: tuple[float, float] | None, form: str = ".4g") -> str:
    return "-" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"
