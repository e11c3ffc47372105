"""The training paper's propositions, checked with random numbers, and their sizes in this model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ..adapters_lora import targets
from ..lab import Lab
from .propositions import adam_ratio, coverage, dimension, entry_bound, newton_ratios, size

COVERAGE = ((256, 8, 4), (1024, 16, 64), (2048, 8, 512), (4096, 32, 32))  # N, d, k
RANKS = (1, 2, 4, 8, 16, 64)
SIGMA_B, SIGMA_A = 0.01, 0.02
DRAWS = 1000  # entries of dW for each trial
M, CHANNELS = 100.0, 16  # of the problem that Theorem 1 is checked on
_LARGEST = 48  # rows or columns of a matrix whose Jacobian is decomposed


def subspace(lab: Lab, config: dict, path: Path) -> dict:
    """Check propositions 1 to 4 and theorem 1; see ``propositions`` for the figures.

    Args:
        config: ``trials``, ``seed``, and ``rank`` and ``alpha`` of a LoRA.

    Returns:
        ``parameters`` of the model; ``modules``, [rows, columns, how many] of the attention
        projections; lists ``coverage``, ``dimensions``, ``bounds`` and ``sizes``; ``newton``, of
        the ratio times M for 1 and for 16 inputs the 5th, 50th and 95th percentile (``low``,
        ``median``, ``high``) and the ``farthest`` from 1; ``adam``, the ratio by steps.
    """
    trials, rank, alpha = config["trials"], config["rank"], config["alpha"]
    shapes = Counter(tuple(shape) for shape in targets(lab.model, "attention").values())
    reduced = dict.fromkeys(_reduced(*shape, rank) for shape in shapes)
    seeds = iter(range(config["seed"], config["seed"] + 1000))  # another for each experiment
    lab.progress("propositions", 0, 1)
    found = {
        "parameters": sum(parameter.numel() for parameter in lab.model.parameters()),
        "modules": [[m, n, count] for (m, n), count in shapes.items()],
        "coverage": [coverage(*one, trials, next(seeds)) for one in COVERAGE],
        "dimensions": [dimension(*one, next(seeds)) for one in reduced],
        "bounds": [entry_bound(m, n, min(rank, m, n), alpha, next(seeds)) for m, n in shapes],
        "sizes": [size(r, alpha, SIGMA_B, SIGMA_A, DRAWS * trials, next(seeds)) for r in RANKS],
        "newton": [_newton(tokens, trials, next(seeds)) for tokens in (1, 16)],
        "adam": [
            {"steps": steps, "ratio": adam_ratio(M, CHANNELS, steps, next(seeds))}
            for steps in (1, 100)
        ],
    }
    lab.progress("propositions", 1, 1)
    return found


def _reduced(m: int, n: int, rank: int) -> tuple[int, int, int]:
    """A shape in about the proportion of [m, n] whose Jacobian can be decomposed, and a rank."""
    factor = max(1.0, max(m, n) / _LARGEST)
    m, n = (min(size, max(rank, round(size / factor))) for size in (m, n))
    return m, n, min(rank, m, n)


def _newton(tokens: int, trials: int, seed: int) -> dict:
    ratios = np.array(newton_ratios(M, CHANNELS, tokens, trials, seed))
    low, median, high = np.percentile(ratios, (5, 50, 95)).tolist()
    farthest = float(np.abs(ratios - 1).max())
    return {"tokens": tokens, "low": low, "median": median, "high": high, "farthest": farthest}
