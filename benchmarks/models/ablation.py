"""An ablation of SmolLM2-135M: the intact model, a pair of weights, and each alone.

Four conditions should cost four evaluations, and no copy of the model: the bare work is the same
perplexity four times. The eager way zeroes the weights by index in a copy of the model for each
condition.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from benchmarks.case import Case, Error, Provider, relative_error
from benchmarks.expected import ITEM, Work
from benchmarks.models import smollm2
from benchmarks.models.perplexity import load_smollm2
from swkernels.detect.perplexity import perplexity
from swkernels.evidence.ablate import ablate
from swkernels.evidence.yardstick import Yardstick

OP = "ablation"
TOKENS, WINDOW = 1024, 512
MODULE = "model.layers.11.mlp.down_proj"
PAIR = smollm2.SUPER_WEIGHTS[MODULE]
_MEASURE = "relative error of the losses of every condition"


def case(
    device: torch.device,
    *,
    load: Callable[[str, torch.device], torch.nn.Module] = load_smollm2,
    module: str = MODULE,
    pair: list[list[int]] = PAIR,
    tokens: int = TOKENS,
    window: int = WINDOW,
) -> Case:
    """Of ``tokens`` random ones, in float32."""
    model = load("float32", device)
    sets = [[], pair, *([weight] for weight in pair)]

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return {"ids": torch.randint(0, model.config.vocab_size, (tokens,), generator=generator)}

    def measured(inputs, which=model):
        found = perplexity(which, inputs["ids"], window=window)
        return torch.tensor(found.losses, dtype=torch.float64)

    def bare(inputs):
        for _ in sets:
            measured(inputs)
        return {}

    def ours(inputs):
        yardstick = Yardstick(inputs["ids"], window)
        found = ablate(model, {module: pair}, yardstick, conditions=("set", "each"), controls=0)
        losses = [condition.scores.perplexity.losses for condition in found.conditions]
        return {"losses": torch.tensor(losses, dtype=torch.float64)}

    @torch.no_grad()
    def eager(inputs):
        losses = []
        for zero in sets:
            changed = copy.deepcopy(model)
            weight = changed.get_submodule(module).weight
            for row, column in zero:
                weight[row, column] = 0
            losses.append(measured(inputs, changed))
        return {"losses": torch.stack(losses)}

    def judge(inputs):
        exact = eager(inputs)["losses"]

        def error(outputs):
            found = outputs.get("losses", exact)
            return Error(relative_error(found, exact), 0.0, _MEASURE)

        return error

    def providers():
        return [
            Provider("perplexity four times", "bare", bare),
            Provider("swkernels", "ours", ours),
            Provider("a copy of the model for each condition", "eager", eager),
        ]

    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    passes = len(sets) * tokens
    work = (Work(2 * matrices * passes, matrices * ITEM["float32"], 0),)
    config = model.config
    shape = {"tokens": tokens, "columns": config.intermediate_size, "rows": config.hidden_size}
    return Case(
        OP, ("SmolLM2-135M",), f"4 conditions, windows of {window}", shape, "float32", work, 4,
        make, judge, providers, seconds=120.0,
    )  # fmt: skip
