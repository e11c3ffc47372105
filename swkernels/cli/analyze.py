"""``swkernels analyze``: amplification, curvature and sensitivity of chosen weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import measuring

_PROMPTS = typer.Option(help="Windows of the text that the amplification is measured on, at most.")
_LENGTH = typer.Option(help="Tokens of a window.")
_INPUTS = typer.Option(help="How many of them, the first, the loss is differentiated on.")
_RANDOM = typer.Option(help="Random positions beside each weight, in its own matrix.")
_EPS = typer.Option(help="By how much a weight is moved, for differences and sensitivity.")
_DTYPE = typer.Option(help="float32, or auto for a checkpoint that is wide enough.")


def analyze(
    model: Annotated[str, measuring.MODEL],
    weights: Annotated[list[str], measuring.WEIGHTS],
    text: Annotated[Path | None, measuring.TEXT] = None,
    prompts: Annotated[int, _PROMPTS] = 100,
    length: Annotated[int, _LENGTH] = 128,
    inputs: Annotated[int, _INPUTS] = 8,
    random: Annotated[int, _RANDOM] = 1,
    eps: Annotated[float, _EPS] = 1e-4,
    seed: Annotated[int, measuring.SEED] = 0,
    device: Annotated[str | None, measuring.DEVICE] = None,
    dtype: Annotated[str, _DTYPE] = "float32",
    trust_remote_code: Annotated[bool, measuring.TRUST] = False,
    output: Annotated[Path | None, measuring.OUTPUT] = None,
) -> None:
    """Measure amplification, curvature and sensitivity of weights, beside random positions."""
    from swkernels.detect.text import DEFAULT_SOURCE, default_text, read_text
    from swkernels.errors import InvalidInput
    from swkernels.evidence.analyze import analyze as measure
    from swkernels.evidence.edits import weights_of

    least = {"--prompts": (prompts, 1), "--length": (length, 2), "--inputs": (inputs, 1)}
    for name, (value, smallest) in (least | {"--random": (random, 1)}).items():
        if value < smallest:
            raise InvalidInput(f"{name} must be at least {smallest}, got {value}")
    if not 0 < eps < float("inf"):
        raise InvalidInput(f"--eps must be a finite number above 0, got {eps:g}")
    words = default_text() if text is None else read_text(text)
    source = DEFAULT_SOURCE if text is None else str(text)
    work = measuring.at_work(model, output, device, dtype, trust_remote_code)
    with work as (console, folder, progress, load):
        loaded, tokenizer, _ = load()
        result = measure(
            loaded, weights_of(loaded, weights, model), words, tokenizer=tokenizer,
            prompts=prompts, length=length, inputs=inputs, random=random, eps=eps, seed=seed,
            source=source, progress=progress,
        )  # fmt: skip
        measuring.write(folder, result, "analyze")
    show(result, console)
    measuring.show_paths(folder, console)


def show(result, console) -> None:
    """Print the tables of an ``Analysis``."""
    from swkernels.evidence import amplification, curvature, sensitivity

    entries = result.curvature.probe.entries
    labels = [{"weight": entry.label} for entry in entries]

    def table(title: str, rows: list[dict]) -> None:
        console.print(f"\n{title}", soft_wrap=True, markup=False)
        measuring.show_rows(rows, console)

    at = [result.amplification.at(entry.site, entry.column).row() for entry in entries]
    rows = [{**label, **pick(row, "mean", "median", "maximum")} for label, row in zip(labels, at)]
    for found in result.amplification.by_layer():
        where = f"layer {found.layer}" + ("" if found.expert is None else f" expert {found.expert}")
        rows.append({"weight": where, **pick(found.row(), "mean", "median", "maximum", "channel")})
    table(amplification.FORMULA, rows)
    for part, formula in (
        (result.curvature, curvature.FORMULA), (result.sensitivity, sensitivity.FORMULA)
    ):  # fmt: skip
        hidden = ("layer", "module", "expert", "row", "column", "value")
        shown = [{k: v for k, v in row.items() if k not in hidden} for row in part.rows()]
        table(formula, [{**label, **row} for label, row in zip(labels, shown)])
    table("weight over random position, all inputs and pairs", result.ratio_rows())
    for note in result.curvature.probe.notes:
        console.print(note, soft_wrap=True, markup=False)
    console.print(
        f"{result.curvature.buried:.0%} of the differences and {result.sensitivity.buried:.0%} of "
        "the measured changes are smaller than their noise",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def pick(row: dict, *names: str) -> dict:
    """Some of the entries of a row."""
    return {name: row[name] for name in names}
