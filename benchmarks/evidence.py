"""Records of evidence about a model's weights, and the page that is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import records
from benchmarks.tables import table
from swkernels.detect.report import encode
from swkernels.errors import InvalidInput
from swkernels.files import write_atomically

SCHEMA = "swkernels.evidence/1"
FOLDER = records.RESULTS / "evidence"
PAGE = Path(__file__).parent / "EVIDENCE.md"

# Part: what is shown of it, with the formula and the published figures, in the order of the page.
PARTS = {
    "eval": (
        "The model by itself",
        "`swkernels eval`: WikiText-2, ARC-Easy and Winogrande. Perplexity over windows that do "
        "not overlap; the first token of a window is not predicted. A choice is taken for its "
        "lowest perplexity, the training paper's rule; *sum* and *characters* are lm-eval's `acc` "
        "and `acc_norm`. Intervals: 95 %, 2,000 bootstrap draws over questions.",
    ),
    "ablate": (
        "Zeroing, restoring, and random controls",
        "`swkernels ablate --restore-activation`. Published for Llama-7B (arXiv 2411.07191): "
        "perplexity 5.67 to 1,211 without its one super weight, zero-shot average 70.11 to 35.14, "
        "about 50 with the super activation put back. For OLMo-1B (arXiv 2607.08733): perplexity "
        "times 3,663. Random controls are as many weights of the same matrices; of equal magnitude "
        "are the nearest of all down projections.",
    ),
    "ablate-mild": (
        "The milder pair of layer 2",
        "The same for the two weights of layer 2 that feed the same channel.",
    ),
    "ablate-tasks": (
        "Zeroing, measured on questions",
        "The first questions of each task. Published for OLMo-1B: ARC-Easy 60.65 % to 26.98 %.",
    ),
    "scale": (
        "Scaling",
        "`swkernels scale`: the weights times a factor. A replication by others has, for OLMo-1B, "
        "perplexity times 1.03 at 0.75, 8.3 at 0.5, 279 at 0.25. Published for Llama-7B: the best "
        "gain of accuracy, 0.39 points (the authors' notebook has 0.43, at 2).",
    ),
    "verify-catalogue": (
        "The catalogue's entries",
        "`swkernels verify-catalogue`: each entry alone and all together.",
    ),
    "rank": (
        "Where the largest weights are",
        "`swkernels rank`: the share of each kind of projection among the n largest magnitudes of "
        "all q, k, v, o, gate, up and down projections. Published, of a model that is not named: "
        "down_proj has 80 % of the top 10 and 52 % of the top 100.",
    ),
    "consistency": (
        "Consistency over samples",
        "`swkernels scan --samples 1000 --length 128 --no-verify`: in how many samples a position "
        "spikes (docs/detection.md has the rule). Counts are cumulative, as in Table 1 of "
        "arXiv 2607.08733, which has, for OLMo-1B: 9 in all, 13 in half, 24 in a fifth, 58 in any.",
    ),
    "amplification": (
        "Amplification",
        "`swkernels analyze`: M = |x_c| / mean_j |x_j| of the input of each down projection "
        "(arXiv 2607.08733, I.1, I.3.1). Published for Qwen2.5-0.5B-Instruct: mean M of 5 to 10 in "
        "most layers, 52 in layer 3.",
    ),
    "curvature": (
        "Curvature and sensitivity",
        "`swkernels analyze`: second derivatives of the loss by automatic differentiation, and by "
        "finite differences as published, with their noise; the change of the loss for a change of "
        "the weight by 1e-4 (I.3.2, I.3.3). Published ratios to a random position: curvature mean "
        "2.48, median 0.86, largest 74.50; sensitivity 3.39, 1.09, 72.00.",
    ),
}


@dataclass(frozen=True)
class Record:
    """One part, measured.

    Attributes:
        part: a key of ``PARTS``.
        model, settings: what was measured, and how, in words.
        rows: what the table shows.
        lines: sentences below it.
        about: time and commit, see ``machine.provenance``.
    """

    part: str
    model: str
    settings: str
    rows: list[dict]
    lines: list[str]
    about: dict

    def write(self, folder: Path = FOLDER) -> Path:
        """Write the record beside the others; aside, and then renamed."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.part}.json"
        document = encode({"schema": SCHEMA, **vars(self)})
        write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
        return path


def read_all(folder: Path = FOLDER) -> list[Record]:
    """The records of a folder, in the order of the page.

    Raises:
        InvalidInput: a file that follows another schema.
    """
    found = []
    for part in PARTS:
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.pop("schema") != SCHEMA or document["part"] != part:
                raise ValueError(f"no record of {part}")
            found.append(Record(**document))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{path}: no record of {SCHEMA}: {error}") from error
    return found


def page(found: Iterable[Record], folder: Path = FOLDER) -> str:
    """The page of the records, in Markdown."""
    parts = [
        "# Evidence",
        "What was published about super weights, repeated on a model at hand, from the records in "
        "`benchmarks/results/evidence/`. Made by `python -m benchmarks.models.evidence`: each part "
        "is what one command says of single weights. The papers' experiments, those with training "
        "among them, are `swkernels study`; its page of this model is "
        "[studies/README.md](studies/README.md).",
    ]
    for record in found:
        title, words = PARTS[record.part]
        parts += [f"## {title}", words, f"{record.model}. {record.settings}"]
        parts.append(_table(record.rows))
        parts += record.lines
        figure = folder / f"{record.part}.svg"
        if figure.exists():
            parts.append(f"![{title}]({figure.relative_to(PAGE.parent).as_posix()})")
        parts.append(f"Measured {record.about['time'][:10]}, commit `{record.about['commit']}`.")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = [column.replace("_", " ") for column in columns]
    return table(head, [[_cell(row.get(column)) for column in columns] for row in rows])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if math.isfinite(value) and abs(value) >= 1e5:
            return f"{value:,.3g}"
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
