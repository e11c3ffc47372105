"""All studies on a GPU: ``make gpu-studies``.

    python -m benchmarks.gpu studies [--model MODEL] [--data DIR] [--budget NAME] [-o OUT]

The small budget ends after ten minutes, as by Ctrl-C; the same command goes on. ``--dry`` runs a
tiny model on the CPU. See docs/studies.md.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.context import ROOT
from swkernels.studies.budget import BUDGETS

_MINUTES = {"small": 10.0}  # others: as long as it takes


def main(arguments: Sequence[str]) -> int:
    """Run from the command line; return the exit code of ``swkernels study``."""
    from swkernels.cli import main as swkernels

    options = _parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.dry:
            model, data = _tiny(Path(folder))
        else:
            model, data = options.model or _smollm2(), options.data
        given = {
            "--model": model, "--data": data, "--device": "cpu" if options.dry else "cuda",
            "--budget": options.budget, "-o": options.output,
        }  # fmt: skip
        words = [str(word) for pair in given.items() if pair[1] is not None for word in pair]
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
        try:
            return swkernels(["study", *options.studies, *words])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpu.sh studies", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", default=["all"], help="default: all")
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct, as make demo has it")
    parser.add_argument("--data", help="see swkernels study list; default: Hugging Face")
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--minutes", type=float, help="0: as long as it takes")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("-o", dest="output", type=Path, default=ROOT / "build" / "gpu-studies")
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = _MINUTES.get(options.budget, 0.0)
    return options


def _smollm2() -> Path:
    from benchmarks.models import smollm2

    return smollm2.prepare()


def _tiny(folder: Path) -> tuple[Path, Path]:
    """The model and the data of the tests, with a text that is long enough for the small budget."""
    from tests.cli.checkpoints import TEXT, make_model, plant, save
    from tests.studies import tiny

    model = make_model(hidden_size=64, intermediate_size=160)
    plant(model)
    data = tiny.write_data(folder / "data")
    (data / "text.txt").write_text(TEXT * 600, encoding="utf-8")
    return save(model, folder / "model"), data
