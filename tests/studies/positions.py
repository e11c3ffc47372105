"""What the tests of ``curvature`` and ``perturbation`` share: inputs, and made-up figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from swkernels.detect.samples import as_samples
from swkernels.studies.recipe import Plan
from tests.studies import tiny
from tests.studies.by_hand import Checkpoint

PLAN = Plan(replace(tiny.TINY, length=13), tiny.TINY.seeds)  # inputs that differ


def prompts(planted, data):
    """(the model, the inputs [S] of ``PLAN``)."""
    by_hand = Checkpoint(planted, data)
    text = (data / "text.txt").read_text()
    ids, _ = as_samples(text, by_hand.tokenizer, PLAN.budget.inputs, 13, "tokenizer", None)
    assert ids[0].tolist() != ids[1].tolist()
    return by_hand.model, ids


def places(figures: dict) -> list[dict]:
    """The Q positions, in the order of the values."""
    return [*figures["entries"], *(one for drawn in figures["controls"] for one in drawn)]


def figures_of(inputs: int = 8, seed: int = 0, **values) -> dict:
    """Made-up figures of 3 super weights and 3 largest weights, a random position each.

    Args:
        values: by name, a typical value of weights and of random positions, and the factor within
            which two thirds of them lie.
    """
    generator = np.random.default_rng(seed)
    groups = ["super weight"] * 3 + ["largest of a layer"] * 3
    place = {"layer": 0, "module": "m", "expert": None, "row": 0, "column": 0, "value": 1.0}
    found = {
        "entries": [place | {"group": group} for group in groups],
        "controls": [[place]] * 6,
        "loss": [3.0] * inputs,
        "rounding": [1e-8] * inputs,
    }
    for name, (own, random, factor) in values.items():
        typical = np.array([own] * 6 + [random] * 6)
        found[name] = (typical * factor ** generator.normal(size=(inputs, 12))).tolist()
    return found


def by_name(found: dict[str, bool | None], claims) -> list[bool | None]:
    assert set(found) == set(claims)
    return [found[claim] for claim in claims]
