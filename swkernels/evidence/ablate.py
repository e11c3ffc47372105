"""Take chosen weights away and measure what is lost, beside what random weights cost.

Every condition is one reading of the yardstick with some weights zero, in place; there is never a
copy of the model. Random weights of the same matrices say what any weight costs. Random weights of
the same magnitude say whether size explains it. The activation that the weights make, put back
where it appears, says how much of the loss it carries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import nn

from swkernels.errors import InvalidInput
from swkernels.train import Coordinates

from .ablation import CONTROLS, KINDS, Ablation, Condition
from .controls import of_equal_magnitude, of_equal_size
from .edits import TOGETHER, Edits, Entry, weights_of
from .restore import SuperActivations
from .results import Progress, silent
from .yardstick import Scores, Yardstick

MOST = 16  # weights that are taken one by one without being asked


@dataclass(frozen=True)
class _Plan:
    """A condition before it is measured."""

    kind: str
    of: str
    label: str
    entries: tuple[Entry, ...]
    matched: float | None = None


def ablate(
    model: nn.Module,
    weights: object | None,
    yardstick: Yardstick,
    *,
    sets: Mapping[str, object] | None = None,
    conditions: Iterable[str] | None = None,
    controls: int = 3,
    restore_activation: bool = False,
    seed: int = 42,
    name: str | None = None,
    progress: Progress = silent,
) -> Ablation:
    """Zero a set of weights, each alone, all but one, and random weights, and measure each time.

    The kinds of conditions:

    - "intact": the model as it is; always measured, as all others are compared with it.
    - "set": all weights of the set are zero.
    - "restored": so they are, and the activation that they make is put back at the layer and the
      token where it appears, in every sequence; see ``SuperActivations``.
    - "each", "all-but-one": one weight is zero, or all others are. Of two weights each is the
      other's all but one, and is measured once.
    - "random": as many random weights of the same matrices.
    - "magnitude": random weights of about the same magnitudes, of any down projection.

    The weights are put back bit for bit, whatever ends a measurement.

    Args:
        model: its weights are in memory, neither packed nor sharded.
        weights: the set "all together", see ``weights_of``; None where ``sets`` names some.
        yardstick: what is measured. With "restored" it runs every choice of a task in full.
        sets: further sets by name, ablated in the same run.
        conditions: kinds to measure; None: all but "restored", without "each" and "all-but-one"
            for a set of more than 16 weights.
        controls: draws of each kind of random weights.
        restore_activation: also measure "restored".
        seed: of the draws.
        name: of the model, as it was loaded; needed for weights "catalogue".
        progress: called with ("ablating", measurements done, measurements).

    Raises:
        InvalidInput: an argument that is not as above, weights that are not there, zero already or
            packed, too few others to draw from, or a loss of the intact model that is not finite.
            A loss that is not finite once weights are zero is in the result as it is.
    """
    kinds = check_conditions(conditions, restore_activation)
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < 0:
        raise InvalidInput(f"controls must be a number of draws from 0, got {controls!r:.100}")
    named = _named(weights, sets)
    edits = {key: Edits(model, weights_of(model, given, name)) for key, given in named.items()}
    every = _distinct(entry for of_set in edits.values() for entry in of_set.entries)
    notes = list(dict.fromkeys(note for of_set in edits.values() for note in of_set.notes))
    plans: list[_Plan] = []
    for key, of_set in edits.items():
        entries, prefix = tuple(of_set.entries), "" if len(edits) == 1 else f"{key}: "
        if conditions is None and len(entries) > MOST:
            notes.append(
                f"{prefix}each and all-but-one are left out: of {len(entries)} weights they take "
                f"{2 * len(entries)} measurements; ask for them by name"
            )
        plans += _of_set(key, prefix, entries, kinds, conditions is not None)
        plans += _controls(model, key, prefix, entries, every, kinds, controls, seed)

    restoring = "restored" in kinds
    if restoring:  # so that each sequence holds its activation, not what it shares with others
        yardstick = replace(yardstick, share_prefixes=False)
    activations = SuperActivations(model, every if restoring else ())
    changed = {_key(plan) for plan in plans}
    total, done = 1 + len(changed), 0

    def read(strict: bool) -> Scores:
        nonlocal done
        progress("ablating", done, total)
        scores = yardstick.read(model, strict=strict)
        done += 1
        progress("ablating", done, total)
        return scores

    with activations.recorded():
        intact = read(strict=True)
    known: dict[tuple, Scores] = {}
    for plan in plans:
        if _key(plan) in known:
            continue
        back = activations.restored(plan.entries) if plan.kind == "restored" else nullcontext()
        with back, edits[plan.of].zeroed(plan.entries):
            known[_key(plan)] = read(strict=False)
    return Ablation(
        name or type(model).__name__,
        yardstick.to_dict(),
        {key: tuple(of_set.entries) for key, of_set in edits.items()},
        (
            Condition("intact", None, "intact", (), intact, intact),
            *(
                Condition(p.kind, p.of, p.label, p.entries, known[_key(p)], intact, p.matched)
                for p in plans
            ),
        ),
        tuple(notes),
        seed,
        tuple(activations.to_dict()),
    )


def check_conditions(
    conditions: Iterable[str] | None, restore_activation: bool = False
) -> set[str]:
    """Return the kinds to measure; see ``ablate``.

    Raises:
        InvalidInput: an unknown kind.
    """
    if conditions is None:
        chosen = set(KINDS) - {"restored"}
    else:
        chosen = {conditions} if isinstance(conditions, str) else set(conditions)
    unknown = sorted(map(str, chosen - set(KINDS)))
    if unknown:
        raise InvalidInput(
            f"unknown condition {unknown[0]!r:.100}: expected some of {', '.join(KINDS)}"
        )
    return chosen | ({"restored"} if restore_activation else set())


def _named(weights: object | None, sets: Mapping[str, object] | None) -> dict[str, object]:
    named = {} if weights is None else {TOGETHER: weights}
    for key, given in (sets or {}).items():
        if key in named:
            raise InvalidInput(f"a set cannot be called {key!r}: give it another name")
        named[key] = given
    if not named:
        raise InvalidInput("no weights are named: expected one at least")
    return named


def _of_set(
    key: str, prefix: str, entries: tuple[Entry, ...], kinds: set[str], asked: bool
) -> list[_Plan]:
    """The conditions of a set's own weights."""
    plans = []
    if "set" in kinds:
        plans.append(_Plan("set", key, key, entries))
    if "restored" in kinds:
        plans.append(_Plan("restored", key, f"{key}, activation restored", entries))
    one_by_one = 1 < len(entries) and (asked or len(entries) <= MOST)
    for kind in ("each", "all-but-one") if one_by_one else ():
        for entry in entries if kind in kinds else ():
            if kind == "each":
                label, zero = entry.label, (entry,)
            else:
                label = f"all but {entry.label}"
                zero = tuple(other for other in entries if other is not entry)
            plans.append(_Plan(kind, key, prefix + label, zero))
    return plans


def _controls(
    model: nn.Module,
    key: str,
    prefix: str,
    entries: tuple[Entry, ...],
    every: list[Entry],
    kinds: set[str],
    draws: int,
    seed: int,
) -> list[_Plan]:
    """The conditions of random weights."""
    drawn: list[tuple[str, str, Coordinates, float | None]] = []
    if draws and "random" in kinds:
        sized = of_equal_size(entries, draws, seed, every)
        drawn += [("random", f"random {i}", found, None) for i, found in enumerate(sized, 1)]
    if draws and "magnitude" in kinds:
        alike = of_equal_magnitude(model, entries, draws, seed, every)
        drawn += [
            ("magnitude", f"equal magnitude {i}", found, matched)
            for i, (found, matched) in enumerate(alike, 1)
        ]
    return [
        _Plan(kind, key, prefix + label, tuple(Edits(model, found).entries), matched)
        for kind, label, found, matched in drawn
    ]


def _distinct(entries: Iterable[Entry]) -> list[Entry]:
    return list({(e.site, e.row, e.column): e for e in entries}.values())


def _key(plan: _Plan) -> tuple:
    """The same for conditions that are one state of the model."""
    places = frozenset((e.site, e.row, e.column) for e in plan.entries)
    return places, plan.kind == "restored"


__all__ = [
    "CONTROLS",
    "KINDS",
    "MOST",
    "TOGETHER",
    "Ablation",
    "Condition",
    "ablate",
    "check_conditions",
]
