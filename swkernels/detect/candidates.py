"""Stage 1 of a scan: from peaks to candidate weights.

A candidate is a single weight W[j, m] of a down projection such that channel j's peak stands out
of its layer (``prominence``) and the product x_m w_jm makes up a good part of that peak, at the
peak's own token (``share``). Neither asks for the largest value of a layer, so that one column
that feeds several rows, and several columns that feed one row, are all found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from swkernels import ops
from swkernels.models import DownProjection

from .criteria import dominance, outlier_threshold, prominence
from .tracking import ProjectionState
from .witness import Spike


@dataclass
class Candidate:
    """A weight under suspicion. See docs/report.md for the unit of each field."""

    projection: DownProjection
    expert: int | None
    row: int
    column: int
    weight: float
    spike: Spike
    in_peak: float
    share: float
    dominance: float
    signed_share: float
    methods: dict[str, bool | None] = field(default_factory=dict)

    @property
    def position(self) -> tuple[int, str, int | None, int, int]:
        return (self.projection.layer, self.projection.name, self.expert, self.row, self.column)

    @property
    def product(self) -> float:
        """|x_m w_jm| at the token of the spike."""
        return abs(float(self.spike.x[self.column]) * self.weight)

    @property
    def score(self) -> float:
        """Prominence of the part of the spike that this weight makes: what ranks candidates."""
        score = self.spike.prominence * self.share
        return score if math.isfinite(score) else float("inf")


def find_spikes(states: list[ProjectionState], locate, config) -> list[Spike]:
    """Return where to look: output channels that stand out, each at one or several tokens.

    A channel is looked at where it peaks, and where each input channel peaks whose largest
    product with it, ``max_t |x_m| |w_jm|``, would stand out by itself: several weights of one row
    may make their spikes at different tokens.

    Args:
        states: of the finished tracking pass.
        locate: turns a running token index into (sample, position).
        config: ``ScanConfig``; reads ``methods``, ``prominence``, ``top_rows``, ``top_columns``,
            ``outlier_gamma`` and ``threshold``.
    """
    spikes = []
    for state in states:
        projection = state.projection
        for e in range(state.experts):
            outputs = ops.peaks(state.outputs[e].cpu())
            if int(outputs.tokens.max()) < 0:
                continue
            inputs = ops.peaks(state.inputs[e].cpu())
            expert = projection.expert if projection.experts is None else e
            stand_out = prominence(outputs.values)
            limit = config.prominence * float(outputs.values.median())
            for row in _rows(outputs.values, stand_out, state, e, config):
                products = inputs.values * projection.row(row, expert).abs()
                top = products.topk(min(config.top_columns, len(products)))
                tokens = [outputs.tokens[row], *inputs.tokens[top.indices[top.values >= limit]]]
                for token in dict.fromkeys(int(token) for token in tokens):
                    spikes.append(
                        Spike(
                            projection,
                            expert,
                            row,
                            *locate(token),
                            float(outputs.values[row]),
                            float(stand_out[row]),
                        )
                    )
    return spikes


def _rows(values: torch.Tensor, stand_out: torch.Tensor, state, e: int, config) -> list[int]:
    """The rows that any of the chosen methods names, among the ``top_rows`` largest."""
    wanted = torch.zeros_like(values, dtype=torch.bool)
    if "dominance" in config.methods:
        wanted |= stand_out >= config.prominence
    if "outlier" in config.methods:
        wanted |= values > outlier_threshold(*state.moments[e].tolist(), config.outlier_gamma)
    if "threshold" in config.methods:
        wanted[values.argmax()] |= bool(values.max() > config.threshold)
    rows = values.topk(min(config.top_rows, len(values))).indices
    return rows[wanted[rows]].tolist()


def find_candidates(states: list[ProjectionState], spikes: list[Spike], config) -> list[Candidate]:
    """Name the weights that make the spikes, strongest first, at most ``max_candidates``.

    A weight is judged at the token, among those looked at, where its product is largest.
    """
    by_name = {state.projection.name: state for state in states}
    best: dict[tuple, Candidate] = {}
    for spike in spikes:
        if spike.x is None:
            continue
        for candidate in _at(spike, by_name[spike.projection.name], config):
            other = best.get(candidate.position)
            if other is None or candidate.product > other.product:
                best[candidate.position] = candidate
    candidates = sorted(best.values(), key=lambda c: (-c.score, c.position))
    return candidates[: config.max_candidates]


def _at(spike: Spike, state: ProjectionState, config) -> Iterator[Candidate]:
    """The weights of the spike's row whose products make it, by any of the chosen methods."""
    e = spike.expert if state.projection.experts is not None else 0
    in_peaks = ops.peaks(state.inputs[e].cpu()).values
    out_peaks = ops.peaks(state.outputs[e].cpu()).values
    weights = spike.w
    parts = dominance(spike.x, weights)
    outlier = None
    if state.moments is not None:
        limit = outlier_threshold(*state.moments[e].tolist(), config.outlier_gamma)
        outlier = spike.peak > limit
    for column in parts.share.topk(min(config.top_columns, len(weights))).indices.tolist():
        dominates = float(parts.dominance[column]) > 1
        methods = {
            "dominance": spike.prominence >= config.prominence
            and float(parts.share[column]) >= config.share,
            "outlier": None if outlier is None else outlier and dominates,
            "threshold": _fixed_threshold(in_peaks, out_peaks, spike.row, column, config),
        }
        if any(methods[name] for name in config.methods):
            yield Candidate(
                spike.projection,
                spike.expert,
                spike.row,
                column,
                float(weights[column]),
                spike,
                float(in_peaks[column]),
                float(parts.share[column]),
                float(parts.dominance[column]),
                float(parts.signed_share[column]),
                methods,
            )


def _fixed_threshold(in_peaks, out_peaks, row: int, column: int, config) -> bool:
    """The rule of the super-weight paper's code: both sides' argmax, both above a constant."""
    return (
        row == int(out_peaks.argmax())
        and column == int(in_peaks.argmax())
        and float(out_peaks[row]) > config.threshold
        and float(in_peaks[column]) > config.threshold
    )
