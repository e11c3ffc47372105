"""In how many samples each position spikes, and how the answer settles as samples are added.

The consistency test of the training paper (arXiv 2607.08733, Table 1), on peaks: in one sample,
position (j, m) of a layer spikes when output channel j stands out of its layer and the largest
product with input channel m, ``max_t |x_m| |w_jm|``, either is at the token of j's peak and a good
part of it, ``>= share * |y_j|``, or would stand out by itself. Memory is one counter a position
that ever spiked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from swkernels import ops

from .criteria import prominence
from .tracking import ProjectionState

TIERS = {"100 %": 1.0, ">= 50 %": 0.5, ">= 20 %": 0.2, "any": 0.0}


class Consistency:
    """Counts spiking positions sample by sample.

    Attributes:
        counts: samples in which each (layer, module, expert, row, column) spiked.
        samples: how many samples were added.
        settling: after 1, 2, 5, 10, 20, 50, ... samples, the size of each tier.
    """

    def __init__(self):
        self.counts: Counter[tuple] = Counter()
        self.samples = 0
        self.settling: list[dict] = []

    def add(self, positions: Iterable[tuple]) -> None:
        """Count the positions that spike in the next sample."""
        self.counts.update(positions)
        self.samples += 1
        if _is_milestone(self.samples):
            self._settle()

    def _settle(self) -> None:
        tiers = self.tiers()
        names = ("all", "half", "fifth", "any")
        self.settling.append({"samples": self.samples, **dict(zip(names, tiers.values()))})

    def tiers(self) -> dict[str, int]:
        """How many positions spike in at least each share of the samples."""
        return {
            name: sum(count >= share * self.samples for count in self.counts.values())
            for name, share in TIERS.items()
        }

    def to_dict(self) -> dict:
        """The ``consistency`` part of the report."""
        if self.samples and (not self.settling or self.settling[-1]["samples"] != self.samples):
            self._settle()
        positions = [
            {
                "layer": layer,
                "module": module,
                "expert": expert,
                "row": row,
                "column": column,
                "count": count,
                "share": count / self.samples,
            }
            for (layer, module, expert, row, column), count in sorted(
                self.counts.items(), key=lambda item: (-item[1], str(item[0]))
            )
        ]
        return {
            "samples": self.samples,
            "positions": positions,
            "tiers": self.tiers(),
            "settling": self.settling,
        }


def spiking_positions(
    state: ProjectionState, sample: int, config
) -> Iterator[tuple[int, int, int]]:
    """(expert, row, column) of what spikes in ``sample`` of the last batch of a projection."""
    inputs, outputs = (
        ops.peaks(state.sample_inputs[sample]),
        ops.peaks(state.sample_outputs[sample]),
    )
    rows_wanted = min(config.top_rows, outputs.values.shape[1])
    columns_wanted = min(config.top_columns, inputs.values.shape[1])
    top = prominence(outputs.values).topk(rows_wanted, dim=1)  # [E, rows_wanted]
    medians = outputs.values.median(1).values
    for e, r in (top.values >= config.prominence).nonzero().tolist():
        row = int(top.indices[e, r])
        weights = state.projection.row(row, e if state.projection.experts else None)
        weights = weights.to(inputs.values.device).abs()
        products, columns = (inputs.values[e] * weights).topk(columns_wanted)
        together = inputs.tokens[e, columns] == outputs.tokens[e, row]
        makes_it = together & (products >= config.share * outputs.values[e, row])
        by_itself = products >= config.prominence * medians[e]
        for column in columns[makes_it | by_itself].tolist():
            yield e, row, column


def _is_milestone(samples: int) -> bool:
    while samples >= 10 and samples % 10 == 0:
        samples //= 10
    return samples in (1, 2, 5)
