"""What studies measure, in plain PyTorch on a checkpoint; and figures made up for verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.studies.made_up import QUESTIONS, MadeUp
from tests.studies.tiny import PLAN, TINY


class Checkpoint:
    """A tiny model, its tokenizer, and the text of a data folder, by transformers alone."""

    def __init__(self, path, data):
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        ids = self.tokenizer((data / "text.txt").read_text())["input_ids"][: TINY.tokens]
        self.windows = torch.tensor(ids).split(TINY.window)
        lines = (data / "arc" / "test.jsonl").read_text().splitlines()[: TINY.questions]
        self.questions = [json.loads(line) for line in lines]

    def down(self, layer: int) -> torch.Tensor:
        """A down projection [D, H]: to be changed in place."""
        return self.model.model.layers[layer].mlp.down_proj.weight.data

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Float64 [S, V] of tokens [S]."""
        return self.model(ids[None]).logits[0].double()

    def losses(self) -> list[float]:
        """Summed next-token loss of each window, in nats."""
        return [
            float(F.cross_entropy(self.logits(ids)[:-1], ids[1:], reduction="sum"))
            for ids in self.windows
        ]

    def predictions(self) -> list[int]:
        """Of each question the choice of lowest perplexity, one word each."""
        found = []
        for question in self.questions:
            scores = []
            for choice in question["choices"]:
                ids = torch.tensor(self.tokenizer(f"{question['context']} {choice}")["input_ids"])
                scores.append(float(self.logits(ids).log_softmax(-1)[-2, ids[-1]]))
            found.append(scores.index(max(scores)))
        return found


def made(figures: dict) -> MadeUp:
    """Made-up figures, by their runs."""
    return MadeUp(PLAN, figures)


def reading(losses: Sequence[float], right: float = 0.6, first: int = 0, **more) -> dict:
    """Figures of a reading: the loss a token of each window, and the share that is right.

    Right are the questions from ``first`` on.
    """
    counts = [100] * len(losses)
    sums = [100 * loss for loss in losses]
    mean = sum(losses) / len(losses)
    answers = [0] * QUESTIONS
    predictions = [int(not 0 <= n - first < round(right * QUESTIONS)) for n in range(QUESTIONS)]
    choices = {"predictions": predictions, "answers": answers}
    text = {"losses": sums, "tokens": counts, "loss": mean, "perplexity": math.exp(mean)}
    return {
        "weights": [],
        "perplexity": text,
        "choices": {"ARC-Easy": choices, "Winogrande": choices},
        "stop_words": None,
    } | more


def verdicts(section) -> dict[str, bool | None]:
    """What holds, by claim."""
    return {verdict.claim: verdict.holds for verdict in section.verdicts}
