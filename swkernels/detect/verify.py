"""Stages 2 and 3 of a scan: group candidates into sets, and judge them by what is lost.

Nothing is called a super weight for its size or its spike: the verdict comes from zeroing, alone,
jointly and jointly but one, against a null of random weights of the same magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from swkernels.models import DownProjection

from .candidates import Candidate
from .evaluate import Baseline, Coordinate, Evaluator, Measurement

SUPER_WEIGHT = "super weight"
PART_OF_SET = "part of a critical set"
CRITICAL_SET = "critical set"
MILD = "mild"
INERT = "inert"
BLOCK_BYTES = 64 * 2**20  # of a packed matrix that are dequantized at once, in float32


@dataclass
class WeightSet:
    """Candidates that were zeroed together.

    Attributes:
        members: indices into the list of candidates.
        measurement: all of them zeroed.
        leave_one_out: for each member, all the others zeroed.
        verdict: "critical set", "mild" or "inert".
    """

    members: list[int]
    measurement: Measurement
    leave_one_out: dict[int, Measurement] = field(default_factory=dict)
    verdict: str = INERT


@dataclass
class Null:
    """Random weights of the candidates' magnitudes, each zeroed alone.

    Attributes:
        matched: median over draws of min(|w|, |w'|) / max(|w|, |w'|); 1 is a perfect match. A
            super weight is often the largest weight of its matrix, then the null's are smaller.
    """

    measurements: list[Measurement]
    matched: float

    @property
    def ratio_max(self) -> float:
        return max((m.ratio for m in self.measurements), default=1.0)

    @property
    def kl_max(self) -> float:
        return max((m.kl for m in self.measurements), default=0.0)


@dataclass
class Verification:
    """What stage 3 measured, aligned with the list of candidates."""

    singles: list[Measurement]
    verdicts: list[str]
    set_of: list[int | None]
    sets: list[WeightSet]
    null: Null
    baseline: Baseline


class Judge:
    """Turns measurements into verdicts; holds the thresholds.

    ``severity`` is log(ratio) / log(critical_ratio): 1 and more is critical. In a model whose
    predictions carry next to no information about the text (an untrained one, a wrong text) the
    perplexity can hardly get worse, so there the damage counts too: damage / critical_damage.
    """

    def __init__(self, config, null: Null, baseline: Baseline):
        self.config = config
        self.null = null
        self.informed = baseline.information >= config.min_information

    def severity(self, m: Measurement) -> float:
        by_ratio = m.log_ratio / math.log(self.config.critical_ratio)
        if self.informed:
            return by_ratio
        return max(by_ratio, m.damage / self.config.critical_damage)

    def level(self, m: Measurement) -> str:
        """Return "critical", "mild" or "inert"."""
        config = self.config
        by_ratio = m.ratio >= config.mild_ratio and m.ratio_low > self.null.ratio_max
        by_damage = m.damage >= config.mild_damage and m.kl > self.null.kl_max
        if not (by_ratio or by_damage):
            return INERT
        return "critical" if self.severity(m) >= 1 else MILD


def verify(
    candidates: list[Candidate],
    evaluator: Evaluator,
    config,
    progress: Callable[[str, int, int], None],
) -> Verification:
    """Measure every candidate alone, the groups jointly and but one, and judge them all."""
    coordinates = [_coordinate(c) for c in candidates]
    null_coordinates, matched = draw_null(
        candidates, config.null_draws, config.seed, evaluator.ready
    )
    components = same_matrix_groups(candidates)
    groups = [group for component in components for group in _subgroups(candidates, component)]

    known: dict[frozenset[int], Measurement] = {}

    def measure(sets: list[list[int]], extra: list[Coordinate], stage: str):
        """Measure what is not known yet: leaving one out of a pair leaves a single weight."""
        new = [members for members in sets if frozenset(members) not in known]
        wanted = [[coordinates[i] for i in members] for members in new]
        wanted += [[coordinate] for coordinate in extra]
        results = []
        if wanted:
            results = evaluator.measure(wanted, lambda done, total: progress(stage, done, total))
        known.update(zip(map(frozenset, new), results))
        return [known[frozenset(members)] for members in sets], results[len(new) :]

    alone = [[i] for i in range(len(candidates))]
    results, null = measure(alone + groups, null_coordinates, "zeroing")
    singles, joints = results[: len(alone)], results[len(alone) :]
    judge = Judge(config, Null(null, matched), evaluator.baseline)

    measured = [WeightSet(members, joint) for members, joint in zip(groups, joints)]
    sets: list[WeightSet] = []
    for component in components:
        inside = [s for s in measured if set(s.members) <= set(component)]
        sets += _reduce(_telling(component, inside, singles, judge), judge, measure)
    sets += _across_layers(candidates, singles, sets, judge, measure)
    for weight_set in sets:
        level = judge.level(weight_set.measurement)
        weight_set.verdict = CRITICAL_SET if level == "critical" else level
    verdicts, set_of = _verdicts(singles, sets, judge)
    return Verification(singles, verdicts, set_of, sets, judge.null, evaluator.baseline)


def draw_null(
    candidates: list[Candidate], draws: int, seed: int, ready: Callable[[DownProjection], None]
) -> tuple[list[Coordinate], float]:
    """Draw random weights, each of about the magnitude of a candidate and from its matrix.

    One of the 100 weights nearest in magnitude, candidates left out, at random; candidates take
    turns. ``ready`` is called before a projection's weight is read. Returns the coordinates and how
    well the magnitudes match (see ``Null.matched``).
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Coordinate] = []
    matches = []
    for draw in range(draws if candidates else 0):
        candidate = candidates[draw % len(candidates)]
        ready(candidate.projection)
        nearest, found = (
            _nearest_packed(candidate, candidates)
            if candidate.projection.is_packed
            else _nearest(candidate.projection.values(candidate.expert), candidate, candidates)
        )
        at = int(torch.randint(len(nearest), (1,), generator=generator))
        row, column = divmod(int(nearest[at]), candidate.projection.columns)
        chosen.append((candidate.projection, candidate.expert, row, column))
        pair = sorted((abs(float(found[at])), abs(candidate.weight)))
        matches.append(pair[0] / pair[1] if pair[1] else 1.0)
    matched = float(torch.tensor(matches).median()) if matches else math.nan
    return chosen, matched


def _distance(
    matrix: torch.Tensor, start: int, candidate: Candidate, candidates: list[Candidate]
) -> torch.Tensor:
    """How far magnitudes of rows from ``start`` on are from the candidate's; candidates: inf.

    So are those that are no number: they come last, and compare with others.
    """
    distance = (matrix.abs().float() - abs(candidate.weight)).abs()
    distance.nan_to_num_(nan=math.inf, posinf=math.inf)
    for other in candidates:
        same = other.projection is candidate.projection and other.expert == candidate.expert
        if same and start <= other.row < start + len(matrix):
            distance[other.row - start, other.column] = math.inf
    return distance.flatten()


def _nearest(matrix: torch.Tensor, candidate: Candidate, candidates: list[Candidate]):
    """Flat positions of the 100 weights nearest in magnitude, and their values."""
    distance = _distance(matrix, 0, candidate, candidates)
    nearest = distance.topk(min(100, distance.numel()), largest=False).indices
    return nearest, matrix[nearest // matrix.shape[1], nearest % matrix.shape[1]]


def _nearest_packed(candidate: Candidate, candidates: list[Candidate]):
    """The same of a packed matrix, a block of rows at a time.

    Packed values repeat, so many are equally near: those that come first in the matrix are taken.
    """
    projection = candidate.projection
    D, H = projection.rows, projection.columns
    height = max(1, BLOCK_BYTES // (4 * H))
    kept: tuple[torch.Tensor, ...] | None = None  # distances, positions, values
    for start in range(0, D, height):
        matrix = projection.packed_rows(start, min(start + height, D), candidate.expert)
        distance = _distance(matrix, start, candidate, candidates)
        last = distance.topk(min(100, distance.numel()), largest=False).values.max()
        at = torch.cat([(distance < last).nonzero()[:, 0], (distance == last).nonzero()[:100, 0]])
        new = (distance[at], at + start * H, matrix.flatten()[at])
        joined = new if kept is None else tuple(torch.cat(pair) for pair in zip(kept, new))
        order = joined[1].argsort()
        order = order[joined[0][order].argsort(stable=True)][:100]
        kept = tuple(part[order] for part in joined)
    return kept[1], kept[2]


def same_matrix_groups(candidates: list[Candidate]) -> list[list[int]]:
    """Group candidates of one matrix that share a row or a column; groups of two and more."""
    return _components(
        candidates,
        lambda a, b: (
            a.projection is b.projection
            and a.expert == b.expert
            and (a.row == b.row or a.column == b.column)
        ),
    )


def _coordinate(candidate: Candidate) -> Coordinate:
    return candidate.projection, candidate.expert, candidate.row, candidate.column


def _components(candidates: list[Candidate], linked) -> list[list[int]]:
    parent = list(range(len(candidates)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i in range(len(candidates)):
        for j in range(i):
            if linked(candidates[i], candidates[j]):
                parent[root(i)] = root(j)
    groups: dict[int, list[int]] = {}
    for i in range(len(candidates)):
        groups.setdefault(root(i), []).append(i)
    return [members for members in groups.values() if len(members) > 1]


def _subgroups(candidates: list[Candidate], component: list[int]) -> list[list[int]]:
    """A component's rows fed by several columns, its columns that feed several rows, and itself."""
    groups: dict[tuple, list[int]] = {}
    for i in component:
        groups.setdefault(("row", candidates[i].row), []).append(i)
        groups.setdefault(("column", candidates[i].column), []).append(i)
    several = [members for members in groups.values() if len(members) > 1]
    return several if component in several else [*several, component]


def _telling(
    component: list[int], measured: list[WeightSet], singles: list[Measurement], judge: Judge
) -> list[WeightSet]:
    """Choose the sets that tell what a component's weights do together.

    A row or a column counts when it is clearly worse than its worst weight; the whole component
    when it is clearly worse than those; if all is harmless, the component stands for it.
    """
    whole = next(s for s in measured if len(s.members) == len(component))
    worst = max(judge.severity(singles[i]) for i in component)
    told = []
    for s in measured:
        alone = max(judge.severity(singles[i]) for i in s.members)
        harmful = judge.level(s.measurement) != INERT
        if s is not whole and harmful and judge.severity(s.measurement) > 1.2 * alone:
            told.append(s)
            worst = max(worst, judge.severity(s.measurement))
    if judge.level(whole.measurement) != INERT and judge.severity(whole.measurement) > 1.5 * worst:
        return [whole]
    if not told and judge.level(whole.measurement) == INERT:
        return [whole]
    return told


def _reduce(sets: list[WeightSet], judge: Judge, measure) -> list[WeightSet]:
    """Leave out, one at a time, the members that a harmful set does not need.

    A member is not needed when its loss takes less than ``spare_share`` of an equal share of the
    severity: the others alone keep 1 - spare_share / n of it. The least needed goes first. A set
    that comes down to one weight is that weight's own story and is not reported as a set; an
    inert set is reported as it is.
    """
    kept = []
    for weight_set in sets:
        while judge.level(weight_set.measurement) != INERT and len(weight_set.members) > 1:
            members = weight_set.members
            others = [[j for j in members if j != i] for i in members]
            results, _ = measure(others, [], "leaving one out")
            weight_set.leave_one_out = dict(zip(members, results))
            severity = judge.severity(weight_set.measurement)
            rest = {i: judge.severity(m) for i, m in weight_set.leave_one_out.items()}
            spare = max(rest, key=lambda i: (rest[i], i))
            if rest[spare] < (1 - judge.config.spare_share / len(members)) * severity:
                break
            remaining = [j for j in members if j != spare]
            weight_set = WeightSet(remaining, weight_set.leave_one_out[spare])
        if len(weight_set.members) > 1:
            kept.append(weight_set)
    return kept


def _across_layers(candidates, singles, sets, judge: Judge, measure) -> list[WeightSet]:
    """Look for sets over several layers that write the same residual channel.

    Only candidates whose spike enters the residual stream take part. Such a set is reported when
    it is critical and clearly worse than the worst weight or set inside it.
    """
    groups = [
        [i for i in group if candidates[i].spike.persistence > 0]
        for group in _components(
            candidates,
            lambda a, b: (
                a.row == b.row
                and a.projection.block_name.rpartition(".")[0]
                == b.projection.block_name.rpartition(".")[0]
            ),
        )
    ]
    groups = [group for group in groups if len({candidates[i].projection.layer for i in group}) > 1]
    if not groups:
        return []
    found = []
    joints, _ = measure(groups, [], "across layers")
    for group, joint in zip(groups, joints):
        inside = [judge.severity(singles[i]) for i in group]
        inside += [judge.severity(s.measurement) for s in sets if set(s.members) <= set(group)]
        if judge.level(joint) == "critical" and judge.severity(joint) > 1.2 * max(inside):
            found.append(WeightSet(group, joint))
    return _reduce(found, judge, measure)


def _verdicts(singles, sets: list[WeightSet], judge: Judge):
    verdicts, set_of = [], []
    for i, single in enumerate(singles):
        mine = [k for k, s in enumerate(sets) if i in s.members]
        mine.sort(key=lambda k: -judge.severity(sets[k].measurement))
        critical = [k for k in mine if sets[k].verdict == CRITICAL_SET]
        level = judge.level(single)
        if level == "critical":
            verdicts.append(SUPER_WEIGHT)
        elif critical:
            verdicts.append(PART_OF_SET)
        elif any(sets[k].verdict == MILD for k in mine):
            verdicts.append(MILD)
        else:
            verdicts.append(level)
        set_of.append(mine[0] if mine else None)
    return verdicts, set_of
