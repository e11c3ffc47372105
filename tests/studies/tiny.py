"""A study at a tiny size: a planted model, questions of known words, a budget of seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from swkernels.detect.loading import load_model
from swkernels.studies.book import Book
from swkernels.studies.budget import SMALL, Budget
from swkernels.studies.data import Data
from swkernels.studies.recipe import Found, Plan
from swkernels.studies.study import RUNS, Model, study
from swkernels.train import Coordinates
from tests.cli.checkpoints import TEXT, WORDS

SHAPES = {(f"model.layers.{layer}.mlp.down_proj", None): (32, 48) for layer in range(2)}
TINY: Budget = replace(
    SMALL, name="tiny", samples=4, length=16, tokens=128, window=32, questions=6,
    train_questions=8, sweep_questions=8, epochs=2, held_out=3, points=2, point_tokens=64,
    counts=(4, 8, 16, 32), ranked=64, delta_top=6, seeds=(42, 43, 44), prompts=3, inputs=2,
    top=2, trials=20, blocks=(16, 64, 256),
)  # fmt: skip
PLANTED = Coordinates.of({"model.layers.1.mlp.down_proj": [(5, 7)]}, SHAPES)
PLAN = Plan(TINY, TINY.seeds)
ABOUT = {  # of a record, beside what is of its run
    "identity": {"model": "1f", "dtype": "float32", "super weights": "detected"},
    "model": "planted", "device": "cpu", "threads": 1,
    "versions": {"swkernels": "0.1.0", "peft": None},
    "budget": "tiny", "seeds": list(TINY.seeds), "task": "arc", "seconds": 90.0,
}  # fmt: skip


def write_data(folder: Path) -> Path:
    """A folder as ``--data`` takes it."""
    (folder / "arc").mkdir(parents=True)
    (folder / "winogrande").mkdir()
    (folder / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    for shift, name in enumerate(("train", "dev", "test")):
        lines = [json.dumps(_question(n + 5 * shift)) for n in range(12)]
        (folder / "arc" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [json.dumps(_gap(n)) for n in range(12)]
    (folder / "winogrande" / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(names: list[str], checkpoint: Path, data: Path, output: Path, plan: Plan = PLAN, **options):
    """Run studies of a checkpoint; returns the figures found, by ``Found``."""
    model = Model("planted", lambda: load_model(str(checkpoint), dtype="float32"))
    options = {"super_weights": PLANTED} | options
    study(names, model, output, plan, data=Data(data), **options)
    return Found(Book(output / RUNS), plan)


def _question(n: int) -> dict:
    words = [WORDS[(n + 3 * i) % 14] for i in range(7)]
    choices = [WORDS[(n + i) % 14] for i in range(4)]
    return {"context": " ".join(words), "choices": choices, "answer": n % 4}


def _gap(n: int) -> dict:
    a, b = WORDS[n % 14], WORDS[(n + 5) % 14]
    sentence = f"the {a} is in _ and one {b}"
    return {"sentence": sentence, "option1": a, "option2": b, "answer": str(1 + n % 2)}
