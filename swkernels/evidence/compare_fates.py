"""What becomes of coordinates and of super activations over a series of scan reports.

A level is how much harm a coordinate does in one report: 0 not a candidate, 1 inert, 2 mild, 3 a
super weight, alone or as part of a critical set. The fates are defined in docs/evidence/compare.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .compare_reports import Place, Sighting

STAYS, MOVES, APPEARS = "stays", "moves", "appears"
FADES, FLICKERS, UNCHANGED = "fades", "flickers", "unchanged"
FATES = (STAYS, MOVES, APPEARS, FADES, FLICKERS, UNCHANGED)

LEVELS = {None: 0, "inert": 1, "mild": 2, "part of a critical set": 3, "super weight": 3}
_SUPER, _HARM = 3, 2  # the least levels of a super weight, and of what does harm at all


def levels_of(sightings: Sequence[Sighting], verified: bool) -> list[int]:
    """The level of a coordinate in each report.

    Args:
        verified: whether all reports are. Where one is not, presence alone counts: 3 for being a
            candidate, 0 for not being one.
    """
    if verified:
        return [LEVELS[sighting.verdict] for sighting in sightings]
    return [0 if sighting.verdict is None else _SUPER for sighting in sightings]


def fate_of(levels: Sequence[int]) -> str:
    """The fate of a coordinate by its own levels, moves left aside."""
    if len(set(levels)) == 1:
        return STAYS if levels[0] == _SUPER else UNCHANGED
    if list(levels) == sorted(levels):
        return APPEARS
    return FADES if list(levels) == sorted(levels, reverse=True) else FLICKERS


def moves(
    levels: Mapping[Place, Sequence[int]], sightings: Mapping[Place, Sequence[Sighting]]
) -> dict[Place, Place]:
    """Pair each coordinate that loses its harm with the one that takes over from it.

    Nearest first: the same weight before a neighbouring layer, then the larger output peak.
    """
    harmful = {p: [level >= _HARM for level in found] for p, found in levels.items()}
    going = {p: sum(h) for p, h in harmful.items() if fate_of(levels[p]) == FADES and not h[-1]}
    coming = {
        p: h.count(False) for p, h in harmful.items() if fate_of(levels[p]) == APPEARS and h[-1]
    }
    options = []
    for old, last in going.items():
        for new, first in coming.items():
            same = (old.layer, old.module, old.expert) == (new.layer, new.module, new.expert)
            beside = abs(old.layer - new.layer) == 1
            if 0 < first == last and old.row == new.row and (same or beside):
                spike = sightings[new][first].out_peak or 0.0
                options.append((not same, -spike, len(options), old, new))
    pairs: dict[Place, Place] = {}
    for *_, old, new in sorted(options, key=lambda option: option[:3]):
        if old not in pairs and new not in pairs.values():
            pairs[old] = new
    return pairs


def activation_fate(channels: Sequence[int | None]) -> str:
    """The fate of a layer's largest output channel, None where none stands out.

    Other layers are left aside.
    """
    runs = [channels[0]]
    for channel in channels[1:]:
        if channel != runs[-1]:
            runs.append(channel)
    if runs == [None]:
        return UNCHANGED
    if len(runs) == 1:
        return STAYS
    if len(set(runs)) < len(runs) or None in runs[1:-1]:
        return FLICKERS
    if None not in runs or len(runs) > 2:
        return MOVES
    return APPEARS if runs[0] is None else FADES


def activation_moves(channels: Mapping[int, Sequence[int | None]]) -> dict[int, int]:
    """Pair each layer whose channel fades with the neighbour where the same one takes over."""
    fates = {layer: activation_fate(found) for layer, found in channels.items()}
    pairs: dict[int, int] = {}
    for layer, found in channels.items():
        for beside in (layer - 1, layer + 1):
            if fates[layer] != FADES or fates.get(beside) != APPEARS or beside in pairs.values():
                continue
            handed_over = all((a is None) != (b is None) for a, b in zip(found, channels[beside]))
            if handed_over and found[0] == channels[beside][-1]:
                pairs.setdefault(layer, beside)
    return pairs
