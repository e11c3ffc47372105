"""What the training paper's appendix I measures, of any weights: see docs/evidence/analyze.md."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from swkernels.detect.report import versions
from swkernels.detect.samples import as_samples
from swkernels.errors import InvalidInput
from swkernels.train import Coordinates

from .amplification import LENGTH, PROMPTS, Amplification, amplification
from .curvature import Curvature
from .probe import EPSILON, probe
from .results import Progress, Result, silent
from .sensitivity import Sensitivity

INPUTS = 8
# arXiv 2607.08733, I.3.2 and I.3.3: 50 inputs, 3 (5) candidates of a layer; no model is named
PUBLISHED = {
    "curvature": {"mean": 2.48, "median": 0.86, "maximum": 74.50, "deviation": 8.68},
    "sensitivity": {"mean": 3.39, "median": 1.09, "maximum": 72.00, "deviation": 8.43},
}


@dataclass(frozen=True)
class Analysis(Result):
    """Amplification, curvature and sensitivity of the same weights, on the same text.

    Attributes:
        amplification: of every down projection and at the weights' columns.
        curvature, sensitivity: of the weights and of random positions; they share a ``Probe``.
        source: what the text is.
        length: tokens of a prompt.
        seed: of the random positions.
    """

    amplification: Amplification
    curvature: Curvature
    sensitivity: Sensitivity
    source: str
    length: int
    seed: int

    schema = "swkernels.analysis/1"
    height = 10.5

    def rows(self) -> list[dict]:
        """A row for each weight: M at its column, then what ``Curvature`` and ``Sensitivity`` say.

        All are means over prompts or inputs; ``docs/evidence/analyze.md`` has the columns.
        """
        rows = []
        bent, moved = self.curvature.rows(), self.sensitivity.rows()
        for entry, curve, change in zip(self.curvature.probe.entries, bent, moved):
            found = self.amplification.at(entry.site, entry.column)
            row = {**entry.to_dict(), "amplification": found.spread.mean}
            for name in ("curvature", "random_curvature", "differences"):
                row[name] = curve[name]
            row["differences_noise"] = curve["noise"]
            for name in ("foretold", "random_foretold", "measured"):
                row[name] = change[name]
            row["measured_noise"] = change["noise"]
            rows.append(row)
        return rows

    def ratio_rows(self) -> list[dict]:
        """A row for each kind of ratio of a weight to its random position, published ones too."""
        kinds = {
            "curvature, exact": self.curvature.ratios,
            "curvature, exact, magnitudes": self.curvature.magnitude_ratios,
            "curvature, differences": self.curvature.difference_ratios,
            "sensitivity, foretold": self.sensitivity.ratios,
            "sensitivity, measured": self.sensitivity.measured_ratios,
        }
        rows = [{"ratio": kind, **spread.to_dict()} for kind, spread in kinds.items()]
        return rows + [{"ratio": f"{kind}, published", **p} for kind, p in PUBLISHED.items()]

    def to_dict(self) -> dict:
        """All three, with what they were measured by."""
        curvature, sensitivity = self.curvature.to_dict(), self.sensitivity.to_dict()
        del curvature["probe"], sensitivity["probe"]  # the same one
        return {
            "schema": self.schema,
            "versions": versions("torch", "transformers"),
            "text": self.source,
            "length": self.length,
            "seed": self.seed,
            "rows": self.rows(),
            "ratios": self.ratio_rows(),
            "amplification": self.amplification.to_dict(),
            "curvature": curvature,
            "sensitivity": sensitivity,
            "probe": self.curvature.probe.to_dict(),
        }

    def _draw(self, figure) -> None:
        for axes, part in zip(
            figure.subplots(3, 1), (self.amplification, self.curvature, self.sensitivity)
        ):
            part.draw(axes)


def analyze(
    model: nn.Module,
    coordinates: Coordinates,
    texts: object = None,
    *,
    tokenizer: object = None,
    prompts: int = PROMPTS,
    length: int = LENGTH,
    inputs: int = INPUTS,
    random: int = 1,
    eps: float = EPSILON,
    seed: int = 0,
    source: str | None = None,
    progress: Progress = silent,
) -> Analysis:
    """Measure amplification, curvature and sensitivity of weights of a model.

    Args:
        model: a decoder in float32 or float64; run in eval mode and given back as it was.
        coordinates: of this model.
        texts: texts, cut into prompts; token ids, [N, S] or a list of [S]; None for the text that
            every Python carries.
        tokenizer: for texts.
        prompts: how many prompts at most the amplification is measured on.
        length: their tokens at most.
        inputs: how many of the prompts, the first, the loss is differentiated on.
        random, eps, seed: see ``probe``.
        source: what the texts are, for reports.
        progress: called with (stage, done, total).

    Returns:
        ``Analysis``.

    Raises:
        InvalidInput: as ``amplification`` and ``probe`` do.
        NonFiniteActivation: an input of a down projection is NaN or infinite.
    """
    for name, value in (("prompts", prompts), ("inputs", inputs), ("random", random)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidInput(f"{name} must be an integer of at least 1, got {value!r}")
    if length < 2:
        raise InvalidInput(f"length must be at least 2 tokens, got {length}")
    ids, source = as_samples(texts, tokenizer, max(prompts, inputs), length, "tokenizer", source)
    # The derivatives come first: they have more to refuse.
    found = probe(
        model, coordinates, ids[:inputs], random=random, eps=eps, seed=seed, progress=progress
    )
    amplified = amplification(
        model,
        ids[:prompts],
        coordinates=coordinates,
        samples=prompts,
        length=length,
        progress=progress,
    )
    return Analysis(amplified, Curvature(found), Sensitivity(found), source, length, seed)
