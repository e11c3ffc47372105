"""``swkernels ablate``: chosen weights taken away, beside random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import measuring

# The defaults shown are those of swkernels.evidence.ablate; a test compares.
_CONDITIONS = typer.Option(
    "--conditions",
    help="Some of set, restored, each, all-but-one, random, magnitude, with commas between them.",
    show_default="all but restored",
)
_CONTROLS = typer.Option(help="Draws of each kind of random weights, for comparison.")
_RESTORE = typer.Option(
    "--restore-activation",
    help="Also measure the set gone and its activation put back, at its layer and token.",
)
_STOP_WORDS = typer.Option("--stop-words", help="Measure how likely stop words are, too.")


def ablate(
    model: Annotated[str, measuring.MODEL],
    weights: Annotated[list[str], measuring.WEIGHTS],
    conditions: Annotated[str | None, _CONDITIONS] = None,
    controls: Annotated[int, _CONTROLS] = 3,
    restore_activation: Annotated[bool, _RESTORE] = False,
    stop_words: Annotated[bool, _STOP_WORDS] = False,
    text: Annotated[Path | None, measuring.TEXT] = None,
    no_text: Annotated[bool, measuring.NO_TEXT] = False,
    tokens: Annotated[int | None, measuring.TOKENS] = None,
    window: Annotated[int | None, measuring.WINDOW] = None,
    stride: Annotated[int | None, measuring.STRIDE] = None,
    batch_size: Annotated[int, measuring.BATCH_SIZE] = 1,
    task: Annotated[list[str] | None, measuring.TASK] = None,
    limit: Annotated[int | None, measuring.LIMIT] = None,
    seed: Annotated[int, measuring.SEED] = 42,
    device: Annotated[str | None, measuring.DEVICE] = None,
    dtype: Annotated[str | None, measuring.DTYPE] = None,
    trust_remote_code: Annotated[bool, measuring.TRUST] = False,
    output: Annotated[Path | None, measuring.OUTPUT] = None,
) -> None:
    """Zero chosen weights of MODEL, together and one by one, and random ones beside them."""
    from swkernels.errors import InvalidInput
    from swkernels.evidence.ablate import ablate as run
    from swkernels.evidence.ablate import check_conditions
    from swkernels.evidence.stop_words import STOP_WORDS

    chosen = None if conditions is None else [kind.strip() for kind in conditions.split(",")]
    check_conditions(chosen)
    if controls < 0:
        raise InvalidInput(f"--controls must be at least 0, got {controls}")
    if stop_words and no_text:
        raise InvalidInput("--stop-words and --no-text exclude each other: give one of them")
    measures = measuring.read_measures(
        text, no_text, tokens, window, stride, batch_size, task, limit
    )
    work = measuring.at_work(model, output, device, dtype, trust_remote_code)
    with work as (console, folder, progress, load):
        loaded, tokenizer, _ = load()
        yardstick = measures.yardstick(tokenizer, STOP_WORDS if stop_words else ())
        result = run(
            loaded, weights, yardstick, conditions=chosen, controls=controls,
            restore_activation=restore_activation, seed=seed, name=model, progress=progress,
        )  # fmt: skip
        measuring.write(folder, result, "ablate")
    measuring.show_rows(result.rows(), console)
    measuring.show_paths(folder, console, [*result.notes, str(result), *measures.notes])
