"""How far the largest inputs of the down projections stand out: M = |x_c| / mean_j |x_j|.

The training paper (arXiv 2607.08733, appendices I.1 and I.3.1) takes M for what multiplies the
gradient of a weight in column c. It is taken of each token, over the H channels of the input x of
the projection; of a prompt the largest over its tokens counts, at the channel where it is largest
and at columns that a caller names.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from swkernels.detect.samples import Runner, as_samples, check_vocabulary, evaluating
from swkernels.train import Coordinates, Site
from swkernels.train.figure import LINE, MARK, legend_above, log_where_wide
from swkernels.train.sites import find_targets
from swkernels.train.weights import down_projection_weights

from .input_meters import InputMeter, Peak, reading
from .results import Progress, Result, silent
from .spread import Spread

FORMULA = "M = |x_c| / mean_j |x_j|, the largest of a prompt"
PROMPTS, LENGTH = 100, 128


@dataclass(frozen=True)
class Amplified:
    """M at one place: the largest channel of a weight, or one column of it.

    Attributes:
        layer: of a down projection its block's number; None for another linear layer.
        module: the path of the weight's module; expert: its number in a mixture.
        column: the input channel; None where any channel may be the largest.
        values: of each prompt, the largest M over its tokens. A prompt that sends no token to
            this expert has none.
        prompt, token, channel: where the largest of all is; token is None where a mixture does
            not tell, and all are None where there is no value.
    """

    layer: int | None
    module: str
    expert: int | None
    column: int | None
    values: tuple[float, ...]
    prompt: int | None = None
    token: int | None = None
    channel: int | None = None

    @property
    def spread(self) -> Spread:
        """Mean, median and maximum over the prompts."""
        return Spread.of(self.values)

    def row(self) -> dict:
        """What a table shows."""
        found = self.spread
        return {
            "layer": self.layer,
            "module": self.module,
            "expert": self.expert,
            "column": self.column,
            "prompts": found.count,
            "mean": found.mean,
            "median": found.median,
            "maximum": found.maximum,
            "channel": self.channel,
        }


@dataclass(frozen=True)
class Amplification(Result):
    """M of every down projection, over prompts.

    Attributes:
        layers: the largest channel of each down projection (each expert of a mixture).
        columns: M at the columns of the coordinates, once each; empty where none were given.
        prompts: how many there were.
        tokens: in all prompts together.
    """

    layers: tuple[Amplified, ...]
    columns: tuple[Amplified, ...]
    prompts: int
    tokens: int

    schema = "swkernels.amplification/1"
    height = 4.2

    def rows(self) -> list[dict]:
        """A row for each projection (``column`` None), then one for each column."""
        return [found.row() for found in (*self.layers, *self.columns)]

    def by_layer(self) -> list[Amplified]:
        """The largest channel of each layer; of experts, that of the one with the largest mean."""
        best: dict[int, Amplified] = {}
        for found in self.layers:
            if not found.values:
                continue
            known = best.get(found.layer)
            if known is None or found.spread.mean > known.spread.mean:
                best[found.layer] = found
        return list(best.values())

    def at(self, site: Site, column: int) -> Amplified | None:
        """M at a column of a weight that the coordinates named; else None."""
        for found in self.columns:
            known = found.module == site.name and found.column == column
            if known and site.expert in (None, found.expert):
                return found
        return None

    def to_dict(self) -> dict:
        """The rows, with the value of every prompt and where the largest is."""

        def entry(found: Amplified) -> dict:
            place = {"prompt": found.prompt, "token": found.token}
            return {**found.row(), **place, "values": list(found.values)}

        return {
            "schema": self.schema,
            "formula": FORMULA,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "layers": [entry(found) for found in self.layers],
            "columns": [entry(found) for found in self.columns],
        }

    def _draw(self, figure) -> None:
        self.draw(figure.subplots())

    def draw(self, axes) -> None:
        """Fill matplotlib axes, with a bar for each of ``by_layer()``."""
        spreads = {found.layer: found.spread for found in self.by_layer()}
        layers = list(spreads)
        top, mean = [s.maximum for s in spreads.values()], [s.mean for s in spreads.values()]
        axes.bar(layers, top, color=LINE, alpha=0.3, label="largest channel, maximum")
        axes.bar(layers, mean, color=LINE, label="largest channel, mean over prompts")
        marked = [found for found in self.columns if found.layer is not None and found.values]
        means = [found.spread.mean for found in marked]
        if marked:
            where = [found.layer for found in marked]
            axes.plot(where, means, "D", color=MARK, label="column of a weight, mean")
        axes.set_xlabel("layer")
        axes.set_ylabel("M")
        log_where_wide(axes, "y", [value for value in (*top, *mean, *means) if value > 0])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, axis="y", color="#dde2e7", linewidth=0.8)
        legend_above(axes)
        axes.set_title(FORMULA, fontsize=8, pad=20)  # above the legend


def amplification(
    model: nn.Module,
    prompts: object = None,
    *,
    coordinates: Coordinates | None = None,
    tokenizer: object = None,
    samples: int = PROMPTS,
    length: int = LENGTH,
    progress: Progress = silent,
) -> Amplification:
    """Measure M at the input of every down projection.

    One forward a prompt, without the head. The sums of |x| are formed in float64 and nothing as
    large as x is kept. In a mixture each expert is measured on the rows that are routed to it. A
    token whose x is zero everywhere has no M and does not count.

    Args:
        model: run in eval mode and given back as it was; weights may be packed.
        prompts: texts, which are cut into windows of tokens; token ids, [N, S] or a list of [S];
            None for the text that every Python carries.
        coordinates: of this model; M is measured at their columns, too.
        tokenizer: for texts.
        samples, length: at most so many prompts of so many tokens.
        progress: called with (stage, done, total).

    Returns:
        ``Amplification``.

    Raises:
        ProjectionNotFound: the model has no down projection.
        InvalidInput: prompts or coordinates that do not fit.
        NonFiniteActivation: an input of a down projection is NaN or infinite.
    """
    ids, _ = as_samples(prompts, tokenizer, samples, length, "tokenizer", None)
    check_vocabulary(model, ids)
    meters = {weight.site: InputMeter(weight) for weight in down_projection_weights(model)}
    sites = list(meters)
    if coordinates is not None:
        for site, target in find_targets(model, coordinates).items():
            columns = coordinates.weights[site][:, 1].unique().tolist()
            meters.setdefault(site, InputMeter(target)).watch(columns)
    runner = Runner(model)
    whole = any(meter.weight.projection is None for meter in meters.values())
    with evaluating(model), reading(list(meters.values())):
        for number, sample in enumerate(ids):
            (runner.logits if whole else runner.body)(sample[None])
            for meter in meters.values():
                meter.close(number)
            progress("amplification", number + 1, len(ids))
    peaks = {
        site: [_found(meter, *peak) for peak in meter.peaks()] for site, meter in meters.items()
    }
    layers = tuple(peaks[site][0] for site in sites)
    columns = tuple(found for listed in peaks.values() for found in listed[1:])
    return Amplification(layers, columns, len(ids), sum(map(len, ids)))


def _found(meter: InputMeter, column: int | None, peak: Peak) -> Amplified:
    site, projection = meter.weight.site, meter.weight.projection
    layer = None if projection is None else projection.layer
    expert = site.expert
    if expert is None and projection is not None:
        expert = projection.expert
    _, *place = peak.best or (None, None, None, None)
    return Amplified(layer, site.name, expert, column, tuple(peak.values), *place)
