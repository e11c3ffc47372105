"""How well SmolLM2-135M-Instruct survives quantization: perplexity by bits, block and method.

    python -m benchmarks.models.quant_quality [--data FILE] [--windows 8] [--window 1024]

Every linear layer of the blocks has the values of its packed weight, and the model runs in float32
(``swkernels.quant.simulate``): the numbers are those of the packed model without the time of it.
Asymmetric integer codes, as in arXiv 2411.07191. The weights come from a 4-bit file (Q4_1), so that
int4 quantizes what has been quantized before.

The clip of each cell is chosen on other windows of the text than those that it is measured on.

Each cell is one line of benchmarks/results/quality/, written at once: a run that was interrupted
goes on where it stopped. ``python -m benchmarks.report`` makes the table and the plot.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import machine, quality, records
from benchmarks.models import smollm2
from benchmarks.quality import LARGEST, PLAIN, PRESERVE, Cell, Key, Study, Table
from swkernels.backends.plan import Clip
from swkernels.detect.perplexity import perplexity, tokens_of
from swkernels.errors import InvalidInput, SwkernelsError
from swkernels.quant.config import QuantConfig
from swkernels.quant.selection import select
from swkernels.quant.simulate import simulated_weights

RECORD = records.RESULTS / quality.FOLDER / "smollm2-135m.jsonl"
DATA = "SWKERNELS_WIKITEXT2"  # the variable that names the text
_SHARED = Path(__file__).parents[3] / "shared" / "data" / "wikitext2" / "wiki.test.raw"
Z = (9.0, 15.0, 20.0, None)  # the authors' range, and no clip: 8 bits need none
KEPT = 32  # the largest of every matrix, in the last method

console = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    options = _parse(arguments)
    try:
        run(options)
    except SwkernelsError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: what was measured is kept", style="yellow")
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    """Measure the cells that the record lacks.

    Raises:
        InvalidInput: no text, or a record of another study.
    """
    model, tokenizer = _load()
    text = tokens_of(_text(options.data), tokenizer)
    tokens, others = (spread(text, options.windows, options.window, at) for at in (0, 1))
    sizes = [layer.weight.numel() for layer in select(model, QuantConfig())[0]]
    study = Study(
        "SmolLM2-135M-Instruct (Q4_1)", "WikiText-2 test", options.window, options.windows,
        len(sizes), max(sizes), tuple(options.z), KEPT,
    )  # fmt: skip
    table = quality.read(options.output) or Table(study)
    if table.study != study:
        raise InvalidInput(f"{options.output} is of another study: move it, or give another -o")

    def measured(key: Key | None, clip: float | None, text: torch.Tensor):
        """The perplexity of a cell with a clip, and how many weights are kept."""
        if key is None:
            return perplexity(model, text, window=options.window), 0
        keeps = key[2] in (PRESERVE, LARGEST)
        listed = smollm2.SUPER_WEIGHTS if keeps else None
        with simulated_weights(model, config_of(key, clip), listed) as simulated:
            return perplexity(model, text, window=options.window), simulated.kept

    wanted = [None, *product(quality.BITS, quality.BLOCKS, quality.METHODS)]
    missing = [key for key in wanted if key not in table.cells]
    for number, key in enumerate(missing, 1):
        clips = study.z if key and key[2] != PLAIN else (None,)
        clip = clips[0]
        if len(clips) > 1:
            clip = min(clips, key=lambda clip, key=key: measured(key, clip, others)[0].loss)
        result, kept = measured(key, clip, tokens)
        table.cells[key] = Cell(key, result, clip, kept, machine.provenance())
        table.write(options.output)
        what = "original" if key is None else ", ".join(map(str, key))
        console.print(
            f"{number}/{len(missing)} {what}: {result.value:.2f}, z = {clip}",
            markup=False, highlight=False,
        )  # fmt: skip


def config_of(key: Key, clip: float | None) -> QuantConfig:
    """How the weights of a cell are quantized."""
    bits, block, method = key
    return QuantConfig(
        code=f"int{bits}",
        symmetric=False,
        block_size=block,
        clip=None if clip is None else Clip("zscore", clip),
        largest=KEPT if method == LARGEST else 0,
    )


def spread(tokens: torch.Tensor, count: int, window: int, after: int = 0) -> torch.Tensor:
    """``count`` windows, spread evenly over a text [N], one after the other; or those ``after``."""
    whole = len(tokens) // window
    if not 2 <= count <= whole // 2:
        raise InvalidInput(
            f"expected 2 (for a standard error) to {whole // 2} windows of {window} tokens (half "
            f"of the text), got {count}"
        )
    chosen = [number * whole // count + after for number in range(count)]
    return tokens[: whole * window].view(whole, window)[chosen].reshape(-1)


def _load():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2.prepare()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def _text(path: Path | None) -> str:
    path = path or Path(os.environ.get(DATA) or _SHARED)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(
            f"cannot read the text {path}: give wiki.test.raw of WikiText-2 with --data or {DATA}"
        ) from error


def _z(text: str) -> float | None:
    return None if text == "none" else float(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.quant_quality", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, help=f"wiki.test.raw (default: {DATA})")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window")
    parser.add_argument(
        "--z", nargs="+", type=_z, default=Z, help="clips to choose from (default: 9 15 20 none)"
    )
    parser.add_argument("-o", "--output", type=Path, default=RECORD)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
