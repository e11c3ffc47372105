"""What was published about super weights, repeated on SmolLM2-135M-Instruct.

    python -m benchmarks.models.evidence [PART ...] [--data FOLDER]

Each part is what a command of swkernels does; it is written to benchmarks/results/evidence/ at once
and left out where it is there already, so a run that was interrupted goes on where it stopped. The
page benchmarks/EVIDENCE.md is made at the end. The weights come from a 4-bit file (Q4_1).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import evidence, machine
from benchmarks.evidence import Record
from benchmarks.models import smollm2
from benchmarks.report import write_text
from swkernels.detect.perplexity import tokens_of
from swkernels.detect.scan import scan
from swkernels.detect.text import read_text
from swkernels.errors import InvalidInput, SwkernelsError
from swkernels.evidence.ablate import ablate
from swkernels.evidence.analyze import analyze
from swkernels.evidence.edits import weights_of
from swkernels.evidence.evaluate import evaluate
from swkernels.evidence.rank import rank
from swkernels.evidence.results import Result
from swkernels.evidence.scale import scale
from swkernels.evidence.stop_words import STOP_WORDS
from swkernels.evidence.tasks import read_task
from swkernels.evidence.verify_catalogue import verify_catalogue
from swkernels.evidence.yardstick import Yardstick

DATA = "SWKERNELS_DATA"  # the variable that names the folder
_SHARED = Path(__file__).parents[3] / "shared" / "data"
MODEL = "SmolLM2-135M-Instruct (Q4_1 weights, run in float32)"
CATALOGUE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAIR = ["11:507:1229", "11:507:1487"]
MILD = ["2:507:90", "2:507:430"]
TOKENS, WINDOW = 4096, 1024
SAMPLES, LENGTH = 1000, 128
QUESTIONS = 150

console = Console(stderr=True)


@dataclass
class Study:
    """The model and the data that the parts share."""

    data: Path
    analysis: object = None

    @cached_property
    def loaded(self) -> tuple:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = smollm2.prepare()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(path)

    @property
    def model(self):
        return self.loaded[0]

    @property
    def tokenizer(self):
        return self.loaded[1]

    @cached_property
    def text(self) -> str:
        return read_text(self.data / "wikitext2" / "wiki.test.raw")

    def tasks(self, limit: int | None) -> list:
        return [
            read_task(self.data / "arc" / "ARC-Easy-Test.jsonl", limit=limit, name="ARC-Easy"),
            read_task(self.data / "winogrande" / "dev.jsonl", limit=limit, name="Winogrande"),
        ]

    def yardstick(self, *, tokens: int | None = TOKENS, tasks=(), stop_words=()) -> Yardstick:
        """By the beginning of WikiText-2; ``tokens`` None: by the tasks alone."""
        ids = None if tokens is None else tokens_of(self.text, self.tokenizer, tokens)
        return Yardstick(
            ids, WINDOW, tasks=tasks, tokenizer=self.tokenizer, stop_words=stop_words,
            source="WikiText-2 test",
        )  # fmt: skip


@dataclass
class Part:
    """What a part found: what the page shows, and the result that draws the figure."""

    settings: str
    rows: list[dict]
    lines: Sequence[str] = ()
    figure: Result | None = None


BY_TEXT = f"WikiText-2 test, the first {TOKENS:,} tokens in windows of {WINDOW:,}"


def consistency(study: Study) -> Part:
    report = scan(
        study.model, study.text, tokenizer=study.tokenizer, samples=SAMPLES, length=LENGTH,
        verify=False, progress=_show,
    )  # fmt: skip
    found = report.data["consistency"]
    counts = [position["count"] for position in found["positions"]]
    rows, above = [], found["samples"] + 1
    for (tier, count), share in zip(found["tiers"].items(), (1.0, 0.5, 0.2, 0.0)):
        inside = [c for c in counts if share * found["samples"] <= c < above]
        coverage = "-" if not inside else f"{min(inside)} to {max(inside)}"
        rows.append({"spikes in": tier, "positions": count, "samples of the added ones": coverage})
        above = min(above, share * found["samples"])
    settled = ", ".join(
        f"{point['samples']}: {point['all']}/{point['half']}/{point['fifth']}/{point['any']}"
        for point in found["settling"]
    )
    always = [p for p in found["positions"] if p["count"] == found["samples"]]
    named = ", ".join(f"layer {p['layer']} [{p['row']}, {p['column']}]" for p in always)
    lines = [f"How the tiers settle (samples: all/half/fifth/any): {settled}.", f"In all: {named}."]
    settings = f"{found['samples']:,} windows of {LENGTH} tokens of the WikiText-2 test set."
    return Part(settings, rows, lines)


def eval_(study: Study) -> Part:
    found = evaluate(
        study.model, study.yardstick(tokens=16_384, tasks=study.tasks(400)), name=MODEL,
        progress=_show,
    )  # fmt: skip
    wanted = ("measure", "rule", "value", "low", "high")
    rows = [{key: row.get(key) for key in wanted} for row in found.rows()]
    settings = (
        "WikiText-2 test, the first 16,384 tokens in windows of 1,024; the first 400 "
        "questions of ARC-Easy test and of Winogrande dev."
    )
    return Part(settings, rows, figure=found)


def ablate_pair(study: Study) -> Part:
    return _ablation(study, PAIR)


def ablate_mild(study: Study) -> Part:
    return _ablation(study, MILD)


def _ablation(study: Study, weights: list[str]) -> Part:
    found = ablate(
        study.model, weights, study.yardstick(stop_words=STOP_WORDS), restore_activation=True,
        name=MODEL, progress=_show,
    )  # fmt: skip
    words = found.conditions[1].stop_words
    likelier = ", ".join(f"{word.strip()!r} x{ratio:.3g}" for word, ratio in words.items())
    lines = [f"Stop words with all of them zero, times as likely: {likelier}.", *found.notes]
    return Part(f"{BY_TEXT}.", found.rows(), lines, found)


def ablate_tasks(study: Study) -> Part:
    found = ablate(
        study.model, PAIR, study.yardstick(tokens=None, tasks=study.tasks(QUESTIONS)),
        conditions=("set", "each", "random", "magnitude"), controls=1, name=MODEL, progress=_show,
    )  # fmt: skip
    rows = found.rows()
    for row, condition in zip(rows, found.conditions):
        for name, change in condition.changes().items():
            low, high = change.interval
            row[f"{name} 95 %"] = f"{low:+.3f} to {high:+.3f}"
    return Part(f"The first {QUESTIONS} questions of each.", rows, found.notes, found)


def scaling(study: Study) -> Part:
    found = scale(study.model, PAIR, study.yardstick(), name=MODEL, progress=_show)
    return Part(f"{BY_TEXT}.", found.rows(), [str(found)], found)


def verified(study: Study) -> Part:
    found = verify_catalogue(study.model, CATALOGUE, study.yardstick(), progress=_show)
    return Part(f"{BY_TEXT}.", found.rows(), [str(found)], found)


def ranking(study: Study) -> Part:
    found = rank(smollm2.prepare(), cache=False, progress=_show)
    largest = ", ".join(
        f"{row['name']} [{row['row']}, {row['column']}] = {row['value']:.4g}"
        for row in found.rows()[:5]
    )
    settings = f"The {len(found):,} largest of {sum(n for _, n in found.sizes.values()):,} entries."
    return Part(settings, found.shares(), [f"The first five: {largest}."], found)


def _analysis(study: Study):
    if study.analysis is None:
        weights = [weights_of(study.model, one) for one in (PAIR, MILD)]
        study.analysis = analyze(
            study.model, weights[0] | weights[1], study.text, tokenizer=study.tokenizer,
            progress=_show,
        )  # fmt: skip
    return study.analysis


def amplified(study: Study) -> Part:
    analysis = _analysis(study)
    found = analysis.amplification
    settings = f"WikiText-2 test, prompts of {analysis.length} tokens."
    return Part(settings, found.rows(), figure=found)


def curved(study: Study) -> Part:
    found = _analysis(study)
    keep = ("layer", "row", "column", "value")
    rows = [
        {key: value for key, value in row.items() if key in keep or isinstance(value, float)}
        for row in found.rows()
    ]
    spreads = [
        f"{row['ratio']}: mean {row['mean']:.3g}, median {row['median']:.3g}, largest "
        f"{row['maximum']:.3g}, standard deviation {row['deviation']:.3g}"
        for row in found.ratio_rows()
    ]
    lines = ["Ratios of a weight to a random position of its matrix:", *(f"- {s}" for s in spreads)]
    settings = f"WikiText-2 test, inputs of {found.length} tokens."
    return Part(settings, rows, ["\n".join(lines)], found.curvature)


PARTS: dict[str, Callable[[Study], Part]] = {
    "eval": eval_,
    "ablate": ablate_pair,
    "ablate-mild": ablate_mild,
    "ablate-tasks": ablate_tasks,
    "scale": scaling,
    "verify-catalogue": verified,
    "rank": ranking,
    "consistency": consistency,
    "amplification": amplified,
    "curvature": curved,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    options = _parse(arguments)
    study = Study(options.data or Path(os.environ.get(DATA) or _SHARED))
    try:
        for part in options.parts or PARTS:
            run(part, study)
        write_text(evidence.PAGE, evidence.page(evidence.read_all()))
        console.print(str(evidence.PAGE), markup=False)
    except SwkernelsError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: the parts that were finished are kept", style="yellow")
        return 130
    return 0


def run(part: str, study: Study) -> None:
    """Measure one part, unless its record is there."""
    if part not in PARTS:
        raise InvalidInput(f"there is no part {part!r}: expected {', '.join(PARTS)}")
    if (evidence.FOLDER / f"{part}.json").exists():
        console.print(f"{part}: there already", markup=False)
        return
    found = PARTS[part](study)
    record = Record(
        part, MODEL, found.settings, found.rows, list(found.lines), machine.provenance()
    )
    if found.figure is not None:
        evidence.FOLDER.mkdir(parents=True, exist_ok=True)
        found.figure.plot(evidence.FOLDER / f"{part}.svg")
    console.print(str(record.write()), markup=False)


def _show(stage: str, done: int, total: int) -> None:
    console.print(f"  {stage} {done}/{total}", end="\r", markup=False, highlight=False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.evidence", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--data", type=Path, help=f"where wikitext2/ and others are ({DATA})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
