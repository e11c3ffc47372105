"""The mixtures of experts in a scan's report: how tokens were routed, unseen and super experts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from .verify import CRITICAL_SET, PART_OF_SET, SUPER_WEIGHT

FIGURES = ("perplexity", "ratio", "ratio_low", "ratio_high", "kl", "damage")


@dataclass
class Mixture:
    """One mixture of experts of a report.

    Attributes:
        layer, name: the layer, and the path of the module that routes the tokens.
        routed: by expert, how many tokens it has seen; 0 where it is unseen.
    """

    layer: int
    name: str
    routed: dict[int, int] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """How many there are: those that are known, by their numbers."""
        return max(self.routed, default=-1) + 1

    @property
    def unseen(self) -> list[int]:
        """The experts that no token reached, ascending."""
        return sorted(expert for expert, routed in self.routed.items() if not routed)

    def load(self, expert: int) -> float:
        """The expert's tokens over what each would have if all had the same; 0 if unseen."""
        total = sum(self.routed.values())
        return self.routed.get(expert, 0) * len(self.routed) / total if total else 0.0


def mixtures(report: dict) -> list[Mixture]:
    """Return the mixtures of a report, in forward order; none of a report without counts.

    Args:
        report: the document of a scan (docs/report.md).
    """
    found: dict[tuple[int, str], Mixture] = {}
    unseen = [{**entry, "routed": 0} for entry in report.get("unseen", ())]
    for entry in [*report["layers"], *unseen]:
        layer, name = entry["layer"], entry.get("mixture")
        if name is not None and entry["expert"] is not None and "routed" in entry:
            mixture = found.setdefault((layer, name), Mixture(layer, name))
            mixture.routed[entry["expert"]] = entry["routed"]
    return sorted(found.values(), key=lambda mixture: mixture.layer)


def super_experts(candidates: list[dict], sets: list[dict], layers: Iterable[dict]) -> list[dict]:
    """The experts that hold a super weight or a member of a critical set, costliest first.

    Args:
        candidates, sets, layers: of the document.
    """
    by_place: dict[tuple, dict] = {}
    entries = {(e["module"], e["expert"]): e for e in layers if e["expert"] is not None}
    for c in candidates:
        place = (c["module"], c["expert"])
        if place in entries and c["verdict"] in (SUPER_WEIGHT, PART_OF_SET):
            held = by_place.setdefault(place, {"candidates": [], "sets": []})
            held["candidates"].append(c["id"])
    found = []
    for place, held in by_place.items():
        mine = set(held["candidates"])
        held["sets"] = [
            s["id"] for s in sets if s["verdict"] == CRITICAL_SET and mine & set(s["members"])
        ]
        costs = [([i], candidates[i]) for i in held["candidates"]]
        costs += [(sets[i]["members"], sets[i]) for i in held["sets"]]
        zeroed, worst = max(costs, key=lambda cost: _severity(cost[1]))
        entry = entries[place]
        names = ("layer", "module", "expert", "mixture", "routed", "routed_share")
        found.append(
            {name: entry[name] for name in names}
            | held
            | {"zeroed": list(zeroed)}
            | {name: worst[name] for name in FIGURES}
        )
    return sorted(found, key=lambda e: _severity(e), reverse=True)


def _severity(entry: dict) -> tuple:
    return math.isnan(entry["ratio"]), entry["ratio"], entry["damage"]


def unseen_sentence(report: dict) -> str:
    """Say how many experts no token reached, and what else did not run; "" where all did."""
    found = mixtures(report)
    unseen, every = sum(len(m.unseen) for m in found), sum(len(m.routed) for m in found)
    said = []
    if unseen:
        said = [f"{unseen} of {every} experts unseen: a longer or broader text may reach them."]
    idle = [entry["module"] for entry in report.get("unseen", ()) if entry["expert"] is None]
    if idle:
        said.append(f"Never run: {', '.join(idle)}.")
    return " ".join(said)


def ranges(numbers: list[int]) -> str:
    """Write ascending numbers as "0-3, 7, 9-11"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
