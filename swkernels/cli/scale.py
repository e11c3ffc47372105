"""``swkernels scale``: chosen weights multiplied by one factor after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import measuring

# The defaults shown are those of swkernels.evidence.scale; a test compares.
_FACTORS = typer.Option(
    help="Numbers with commas between them; three dots go on with the last step.",
    show_default="0,0.25,...,1.5,2,3",
)
_EACH = typer.Option("--each", help="Scale every weight alone too.")


def scale(
    model: Annotated[str, measuring.MODEL],
    weights: Annotated[list[str], measuring.WEIGHTS],
    factors: Annotated[str | None, _FACTORS] = None,
    each: Annotated[bool, _EACH] = False,
    text: Annotated[Path | None, measuring.TEXT] = None,
    no_text: Annotated[bool, measuring.NO_TEXT] = False,
    tokens: Annotated[int | None, measuring.TOKENS] = None,
    window: Annotated[int | None, measuring.WINDOW] = None,
    stride: Annotated[int | None, measuring.STRIDE] = None,
    batch_size: Annotated[int, measuring.BATCH_SIZE] = 1,
    task: Annotated[list[str] | None, measuring.TASK] = None,
    limit: Annotated[int | None, measuring.LIMIT] = None,
    device: Annotated[str | None, measuring.DEVICE] = None,
    dtype: Annotated[str | None, measuring.DTYPE] = None,
    trust_remote_code: Annotated[bool, measuring.TRUST] = False,
    output: Annotated[Path | None, measuring.OUTPUT] = None,
) -> None:
    """Multiply chosen weights of MODEL by each factor and measure what it does."""
    from swkernels.evidence.scale import FACTORS, check_factors
    from swkernels.evidence.scale import scale as run

    chosen = check_factors(FACTORS if factors is None else parse_factors(factors))
    measures = measuring.read_measures(
        text, no_text, tokens, window, stride, batch_size, task, limit
    )
    work = measuring.at_work(model, output, device, dtype, trust_remote_code)
    with work as (console, folder, progress, load):
        loaded, tokenizer, _ = load()
        result = run(
            loaded, weights, measures.yardstick(tokenizer), chosen, each=each, name=model,
            progress=progress,
        )  # fmt: skip
        measuring.write(folder, result, "scale")
    measuring.show_rows(result.rows(), console)
    measuring.show_paths(folder, console, [*result.notes, str(result), *measures.notes])


def parse_factors(text: str) -> list[float]:
    """Read "0,0.5,1" or "0,0.25,...,3": before three dots two numbers, behind them the last one.

    Raises:
        InvalidInput: no such list, or a step that does not lead to the last number.
    """
    from swkernels.errors import InvalidInput

    factors: list[float] = []
    dots = False
    try:
        for part in text.replace("…", "...").split(","):
            if part.strip() == "..." and not dots:
                step, dots = factors[-1] - factors[-2], True
                continue
            number = float(part)
            factors += _between(factors[-1], step, number) if dots else []
            factors.append(number)
            dots = False
        well_formed = not dots
    except (ValueError, IndexError, ZeroDivisionError, OverflowError):
        well_formed = False
    if not well_formed:
        raise InvalidInput(
            "--factors must be numbers with commas between them, such as 0,0.5,1,2 or "
            f"0,0.25,...,3 (whole steps to the last); got {text!r:.100}"
        )
    return factors


def _between(first: float, step: float, last: float) -> list[float]:
    """The numbers from ``first`` to ``last`` in steps, both left out."""
    steps = round((last - first) / step)
    if not 1 <= steps <= 1000 or abs(first + steps * step - last) > 1e-9 * abs(step):
        raise ValueError
    # 0.30000000000000004 is no factor that anyone means, and 0.9999999999999999 is not 1.
    return [float(f"{first + step * number:.12g}") for number in range(1, steps)]
