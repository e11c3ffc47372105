"""Pruning: perplexity and accuracy with a few weights zero (Tables 7 and 8)."""

from __future__ import annotations

import math

from ..data import NAMES
from ..lab import DETECT
from ..page import cell, percent
from ..recipe import Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from ..sets import CATALOGUE, MAGNITUDE, OTHERS, RANDOM, SUPER_WEIGHTS
from ..words import labels, place
from . import consistency, edited
from .comparing import Accuracy, all_of
from .edited import CHANCE_OF, Change, Ratio, reading

# Table 8: weights that were zeroed; perplexity, ARC-Easy and Winogrande before and after.
PUBLISHED = {
    "OLMo-1B": (2, "13.09 → 47,951", "60.6 % → 27.0 %", "61.6 % → 49.3 %"),
    "OLMo-7B": (2, "9.59 → 42,024", "73.3 % → 60.5 %", "67.5 % → 62.3 %"),
    "Phi-3-mini": (6, "9.48 → 3,543", "81.9 % → 34.3 %", "73.5 % → 51.9 %"),
    "Mistral-7B-v0.1": (1, "8.08 → ∞", "80.3 % → 25.6 %", "75.3 % → 49.5 %"),
    "Meta-Llama-3-8B": (3, "7.44 → ∞", "80.8 % → 25.1 %", "73.9 % → 48.2 %"),
    "Llama-3.1-8B-Instruct, magnitude": (2, "8.92 → 8.92", "82.3 % → 82.2 %", "73.3 % → 73.6 %"),
    "Llama-3.2-3B, magnitude": (2, "9.51 → 9.51", "74.5 % → 74.9 %", "69.4 % → 69.5 %"),
    "Llama-3.2-1B, magnitude": (2, "11.96 → 11.96", "66.3 % → 66.3 %", "60.9 % → 60.9 %"),
    "Qwen2.5-1.5B-Instruct, magnitude": (2, "12.21 → 12.21", "76.8 % → 76.8 %", "62.7 % → 63.0 %"),
    "Gemma-2-9B-it, magnitude": (2, "24.08 → 24.04", "85.9 % → 85.8 %", "75.9 % → 76.0 %"),
}
# Section 3.1: the share of down_proj among the n largest magnitudes of OLMo-1B.
PUBLISHED_SHARES = {10: "80 %", 100: "52 %"}
COLLAPSE = 10  # an order of magnitude; published are 370 to infinity
_DRAWS = 3
_RANKED = 10_000
RANK = Run("rank", {"k": _RANKED}, (DETECT,))


def readings(plan: Plan) -> dict[str, Run]:
    """The intact model and the sets that are zeroed, by the names that the table has."""
    named = {name: reading(plan, name) for name in (SUPER_WEIGHTS, CATALOGUE, MAGNITUDE, OTHERS)}
    drawn = {
        f"{RANDOM} {seed}": reading(plan, RANDOM, seed=seed)
        for seed in range(plan.seed, plan.seed + _DRAWS)
    }
    return {"intact": reading(plan, None)} | named | drawn


def section(found: Found) -> Section | None:
    done = {name: found(run) for name, run in readings(found.plan).items()}
    done = {name: figures for name, figures in done.items() if figures is not None}
    absent = [name for name, figures in done.items() if figures["weights"] is None]
    done = {name: figures for name, figures in done.items() if name not in absent}
    ranked = found(RANK)
    if not done and ranked is None:
        return None
    parts = [*([_table(done)] if done else []), _published()]
    spikes = found(consistency.run_of(found.plan))
    verdicts = _verdicts(done, spikes) if "intact" in done else []
    if ranked is not None:
        parts.append(_shares(ranked))
        parts.append(_ranks(ranked))
        verdicts += [*_not_found(ranked), _mostly_down(ranked)]
    return Section(edited.described(found.plan), parts, verdicts, _notes(absent))


def _table(done: dict[str, dict]) -> Table:
    intact = done.get("intact")
    rows = []
    for name, figures in done.items():
        row = [name, len(figures["weights"])]
        scores = {task: Accuracy.of(choices) for task, choices in figures["choices"].items()}
        perplexity = cell(figures["perplexity"]["perplexity"])
        if intact is None or figures is intact:
            row += [perplexity, *map(str, scores.values())]
        else:
            before, change = cell(intact["perplexity"]["perplexity"]), Change.of(figures, intact)
            row.append(f"{before} → {perplexity}, {change.perplexity}")
            for task, score in scores.items():
                before = percent(Accuracy.of(intact["choices"][task]).value)
                row.append(f"{before} → {percent(score.value)}, {change.accuracy[task]}")
        rows.append(row)
    return Table(["zero", "weights", "perplexity", *NAMES.values()], rows, _INTERVALS)


_INTERVALS = (
    "Before → after zeroing, with 95 % intervals of the change: times (in percent where it is "
    "nearly 1), or points."
)


def _published() -> Table:
    rows = [[model, *figures] for model, figures in PUBLISHED.items()]
    columns = ["published", "weights", "perplexity", "ARC-Easy", "Winogrande"]
    return Table(columns, rows, "Table 8: before → after zeroing.")


def _shares(ranked: dict) -> Table:
    kinds = list(ranked["sizes"])
    rows = [
        [row["top"], *(percent(row[kind]) for kind in kinds), PUBLISHED_SHARES.get(row["top"])]
        for row in ranked["shares"]
    ]
    caption = (
        "The share of each kind of projection among the largest magnitudes of the model; the paper "
        "does not name its model."
    )
    return Table(["largest", *kinds, "down, published"], rows, caption)


def _ranks(ranked: dict) -> Table:
    keys = ("layer", "expert", "row", "column", "value", "rank", "rank_down")
    rows = [[entry[key] for key in keys] for entry in ranked["super_weights"]]
    columns = [*keys[:-2], "rank of all", "of down"]
    return Table(columns, rows, f"Where the super weights stand among the {_RANKED:,} largest.")


def _verdicts(done: dict[str, dict], spikes: dict | None) -> list[Verdict]:
    intact = done["intact"]
    changes = {
        name: Change.of(figures, intact) for name, figures in done.items() if name != "intact"
    }
    verdicts = []
    if SUPER_WEIGHTS in changes:
        verdicts += _collapse(changes[SUPER_WEIGHTS])
    if CATALOGUE in changes:
        ratio = changes[CATALOGUE].perplexity
        claim = "Zeroing the catalogue's weights raises perplexity by orders of magnitude."
        verdicts.append(Verdict(claim, _collapsed(ratio), f"{ratio}.{_shared(done, CATALOGUE)}"))
    if MAGNITUDE in changes:
        change, claim = changes[MAGNITUDE], "Zeroing as many of the largest weights is harmless."
        why = f"{change}.{_shared(done, MAGNITUDE)}"
        verdicts.append(Verdict(claim, change.harmless, why))
    if OTHERS in changes:
        verdicts.append(_harmless_others(changes[OTHERS], done[OTHERS]["weights"], spikes))
    random = [change for name, change in changes.items() if name.startswith(RANDOM)]
    if len(random) == _DRAWS:
        verdicts.append(_harmless_draws(random))
    return verdicts


def _collapse(change: Change) -> list[Verdict]:
    claim = "Zeroing the super weights raises perplexity by orders of magnitude."
    verdicts = [Verdict(claim, _collapsed(change.perplexity), f"{change.perplexity}.")]
    for task, lost in change.accuracy.items():
        holds, why = True if lost.is_loss else False if edited.kept(lost) else None, f"{lost}."
        if task in change.guessed:
            holds = None
            why += (
                f" The intact model, with {change.guessed[task]}, is not clearly above chance, "
                f"{percent(CHANCE_OF[task])}: it cannot fall."
            )
        claim = f"Zeroing the super weights lowers the accuracy on {task}."
        verdicts.append(Verdict(claim, holds, why))
    return verdicts


def _collapsed(ratio: Ratio) -> bool | None:
    return True if ratio.low >= COLLAPSE else False if ratio.high < COLLAPSE else None


def _harmless_draws(changes: list[Change]) -> Verdict:
    holds = all_of(change.harmless for change in changes)
    worst = max(changes, key=lambda change: abs(math.log(change.perplexity.value)))
    claim = "Zeroing as many random weights of the same matrices is harmless."
    return Verdict(claim, holds, f"of {len(changes)} draws the one that changes most: {worst}.")


def _harmless_others(change: Change, weights: list[dict], spikes: dict | None) -> Verdict:
    """Of large weights that were not detected, which may be super weights all the same."""
    holds, why = change.harmless, f"{change}.{f' They are {labels(weights)}.' if weights else ''}"
    if weights and spikes is not None:
        counts = {place(position): position["count"] for position in spikes["positions"]}
        samples, each = spikes["samples"], [counts.get(place(weight), 0) for weight in weights]
        always, often = each.count(samples), sum(count >= samples / 2 for count in each)
        why += (
            f" Of these {len(weights)}, {always} spike in all {samples:,} texts of the consistency "
            f"study and {often} in at least half."
        )
        if always == len(weights):
            holds = None
            why += (
                " These are super weights by the paper's own criterion, so this is no test of "
                "large weights that are none."
            )
        elif always and holds is False:
            holds = None
            why += " Those are super weights by the paper's own criterion: the loss may be theirs."
    claim = "Zeroing the largest weights that are no super weights is harmless."
    return Verdict(claim, holds, why)


def _shared(done: dict[str, dict], name: str) -> str:
    """What a set has in common with the super weights, whose verdict comes first."""
    if SUPER_WEIGHTS not in done:
        return ""
    ours, theirs = ({place(e) for e in done[key]["weights"]} for key in (SUPER_WEIGHTS, name))
    both = len(ours & theirs)
    if ours == theirs:
        return (
            " This set is that of the super weights: it is the first verdict over again and no new "
            "evidence."
        )
    if both:
        return (
            f" Of these {len(theirs)}, super weights are {both}: what those do is in the first "
            "verdict and no new evidence."
        )
    return f" Of these {len(theirs)}, super weights are 0."


def _not_found(ranked: dict) -> list[Verdict]:
    """Of the down projections, which the paper ranks, and of all."""
    entries = ranked["super_weights"]
    verdicts = []
    for key, which, published in (
        ("rank_down", "the down projections", "Published is this ranking"),
        ("rank", "all projections", "Not as published, which ranks the down projections"),
    ):
        first = sum(entry[key] is not None and entry[key] <= len(entries) for entry in entries)
        verdicts.append(
            Verdict(
                f"Ranking {which} by magnitude does not find the super weights.",
                first < len(entries),
                f"among the {len(entries)} largest are {first} of the {len(entries)} super "
                f"weights. {published}.",
            )
        )
    return verdicts


def _mostly_down(ranked: dict) -> Verdict:
    tops = [row for row in ranked["shares"] if row["top"] in PUBLISHED_SHARES]
    shares = {row["top"]: row["down"] for row in tops}
    why = ", ".join(f"{100 * share:.0f} % of the top {top}" for top, share in shares.items())
    claim = "Most of the 10 and of the 100 largest magnitudes are in down_proj."
    return Verdict(claim, all(share > 0.5 for share in shares.values()), f"it has {why}.")


def _notes(absent: list[str]) -> list[str]:
    missing = (
        ["The catalogue has no entry with this model's name and shapes: it has no row."]
        if CATALOGUE in absent
        else []
    )
    return [
        *missing,
        "As many weights are zeroed as there are super weights, but for the catalogue. "
        f"`{MAGNITUDE}` is the largest of all down projections, `{OTHERS}` the largest of "
        f"those that are no super weights, `{RANDOM}` are drawn from the super weights' matrices.",
        "The paper takes perplexity over a rolling context, here windows do not overlap. "
        f"Harmless is a perplexity that rises by less than {100 * (edited.HARMLESS - 1):.0f} % and "
        f"accuracies that fall by less than {100 * edited.POINTS:.0f} points (5.2 is the "
        "least that zeroing published super weights cost in Table 8), both with their whole "
        "intervals. A task on which the intact model is not clearly above chance is left out.",
        "The published perplexities of Llama-3.1-8B-Instruct and of Gemma-2-9B-it are under INT8. "
        "That of Gemma-2-9B-it is also with windows of at most 512 tokens: by the paper it is not "
        "comparable with the other rows.",
        "Intervals of perplexity are over windows, of accuracy over questions, both in pairs; p is "
        "of the sign test.",
    ]


PRUNING = Recipe(
    "pruning",
    "Zeroing super weights, large weights, random weights",
    "Tables 7 and 8 and section 3.1 of arXiv 2607.08733",
    "A few super weights carry the model, a few of the largest or of random ones do not.",
    edited.DATA,
    minutes=8,
    runs=lambda plan: [*readings(plan).values(), RANK],
    section=section,
)
