"""What quantizing a model did to it, layer by layer: a JSON document with a versioned schema."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from swkernels.backends.blocks import to_blocks
from swkernels.backends.plan import Plan
from swkernels.documents import (
    COUNT,
    MAGNITUDE,
    NUMBER,
    TEXT,
    Fields,
    Integer,
    ListOf,
    Maybe,
    Row,
    check_document,
)
from swkernels.errors import InvalidInput
from swkernels.files import read_json, write_atomically
from swkernels.ops.quantized import QuantizedTensor

from .config import QuantConfig

SCHEMA = "swkernels.quantize/1"
_PIECE = 1 << 18  # elements that are compared together
_BYTES = {"bytes_before": COUNT, "bytes_after": COUNT}
_REPORT = Fields(
    {
        "model": TEXT,
        "config": Fields({}),
        "layers": ListOf(
            Fields(
                {
                    "name": TEXT,
                    "expert": Maybe(COUNT),
                    "shape": Row((Integer(1), Integer(1))),
                    "bits": Integer(1, 16),
                    "error": MAGNITUDE,
                    "worst_block": COUNT,
                    "worst_error": MAGNITUDE,
                    "super_weights": ListOf(Row((COUNT, COUNT, NUMBER))),
                    "largest": COUNT,
                    **_BYTES,
                }
            )
        ),
        "left_out": ListOf(Fields({"name": TEXT, "reason": TEXT})),
        "total": Fields(_BYTES),
    }
)


@dataclass(frozen=True)
class LayerReport:
    """One packed matrix.

    Attributes:
        name: path of the module that owns it; of stacked experts with the parameter's name.
        expert: which of stacked experts; None for any other matrix.
        shape: (D, H).
        bits: of a code.
        error: root mean square of what quantizing changed, as a share of that of the weight.
        worst_block: the block with the largest root mean square change.
        worst_error: that change, as a share of the root mean square of the whole weight.
        super_weights: [row, column, value] of each listed weight that is kept exactly.
        largest: how many others are kept exactly.
        bytes_before, bytes_after: of the weight, and of all that is packed.
    """

    name: str
    expert: int | None
    shape: tuple[int, int]
    bits: int
    error: float
    worst_block: int
    worst_error: float
    super_weights: tuple[tuple[int, int, float], ...]
    largest: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantReport:
    """What ``swkernels.quantize`` did.

    Attributes:
        model: the class of the model, and where it was loaded from if that is known.
        config: how it was quantized.
        layers: what was quantized, in the model's order.
        left_out: (name, reason) of each matrix that was not.
        bytes_before, bytes_after: of all parameters and buffers of the model.
    """

    model: str
    config: QuantConfig
    layers: tuple[LayerReport, ...]
    left_out: tuple[tuple[str, str], ...]
    bytes_before: int
    bytes_after: int

    @property
    def error(self) -> float:
        """The mean of the layers' errors, each counting with its number of elements."""
        elements = sum(math.prod(layer.shape) for layer in self.layers)
        total = sum(layer.error * math.prod(layer.shape) for layer in self.layers)
        return total / elements if elements else 0.0

    @property
    def worst(self) -> LayerReport | None:
        """The layer with the largest error."""
        return max(self.layers, key=lambda layer: layer.error, default=None)

    @property
    def super_weights(self) -> int:
        """How many listed weights are kept."""
        return sum(len(layer.super_weights) for layer in self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return f"{self.model}: nothing was quantized"
        return (
            f"{self.model}: {len(self.layers)} matrices in {self.config.code}, "
            f"{self.super_weights} super weights kept, mean error {self.error:.2%}, worst "
            f"{self.worst.error:.2%} ({self.worst.name}), {_megabytes(self.bytes_before)} -> "
            f"{_megabytes(self.bytes_after)}"
        )

    def to_dict(self) -> dict:
        """Return the document."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "config": self.config.to_dict(),
            "layers": [asdict(layer) for layer in self.layers],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
            "total": {
                "matrices": len(self.layers),
                "elements": sum(math.prod(layer.shape) for layer in self.layers),
                "super_weights": self.super_weights,
                "largest": sum(layer.largest for layer in self.layers),
                "error": self.error,
                "bytes_before": self.bytes_before,
                "bytes_after": self.bytes_after,
            },
        }

    def save(self, path: str | Path) -> None:
        """Write the document as JSON, aside and then renamed.

        Raises:
            InvalidInput: the folder is not there or cannot be written.
        """
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False).encode())

    @classmethod
    def load(cls, path: str | Path) -> QuantReport:
        """Read a document that ``save`` wrote.

        Raises:
            InvalidInput: not such a report, or a damaged one.
        """
        data = read_json(path)
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise InvalidInput(f"{path}: expected a report of schema {SCHEMA}, got {schema!r:.200}")
        check_document(data, _REPORT, path)
        own = [field.name for field in fields(LayerReport)]
        layers = [
            LayerReport(**{name: layer[name] for name in own} | {
                "shape": tuple(layer["shape"]),
                "super_weights": tuple(map(tuple, layer["super_weights"])),
            })
            for layer in data["layers"]
        ]  # fmt: skip
        for layer in layers:
            D, H = layer.shape
            if any(row >= D or column >= H for row, column, _ in layer.super_weights):
                raise InvalidInput(f"{path} is damaged: a super weight outside of {layer.name}")
        left_out = [(entry["name"], entry["reason"]) for entry in data["left_out"]]
        try:
            config = QuantConfig.from_dict(data["config"])
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InvalidInput(f"{path} is damaged ({type(error).__name__} {error})") from error
        total = data["total"]
        return cls(
            data["model"], config, tuple(layers), tuple(left_out), total["bytes_before"],
            total["bytes_after"],
        )  # fmt: skip

    def table(self):
        """The layers as a table for a console of rich; the experts of a stack in one row."""
        from rich.table import Table

        table = Table(title=self.model, title_justify="left")
        table.add_column("layer", overflow="fold")
        for title in ("shape", "bits", "error", "worst block", "kept", "bytes"):
            table.add_column(title, justify="right")
        for group in _by_name(self.layers):
            table.add_row(*_cells(group))
        return table


def describe(
    name: str,
    expert: int | None,
    matrix: torch.Tensor,
    q: QuantizedTensor,
    listed: torch.Tensor | None,
) -> LayerReport:
    """Compare a matrix [D, H] with what it was packed to.

    Args:
        listed: the super weights among its outliers, [k, 2].
    """
    error, block, worst = _errors(matrix, q)
    kept: list[tuple[int, int, float]] = []
    if listed is not None:
        rows, cols = listed.to(matrix.device).long().unbind(1)
        kept = list(zip(rows.tolist(), cols.tolist(), matrix[rows, cols].float().tolist()))
    return LayerReport(
        name, expert, (q.plan.rows, q.plan.columns), q.plan.code.bits, error, block, worst,
        tuple(kept), len(q.positions) - len(kept),
        matrix.numel() * matrix.element_size(), q.nbytes,
    )  # fmt: skip


def _errors(matrix: torch.Tensor, q: QuantizedTensor) -> tuple[float, int, float]:
    """The relative error, the worst block, and its error; see ``LayerReport``."""
    plan = q.plan
    per_block = torch.zeros(plan.blocks, dtype=torch.float64, device=matrix.device)
    power = 0.0
    now, was = q.dequantize(torch.float32).view(-1), matrix.reshape(-1)
    for start, stop, block, sums in _pieces(plan):
        piece = was[start:stop].float()
        power += float(torch.dot(piece, piece))
        found = sums(torch.sub(now[start:stop], piece).square_())
        per_block[block : block + len(found)] += found
    if power == 0:
        return 0.0, 0, 0.0  # a matrix of zeros is packed exactly
    means = per_block / _sizes(plan, per_block.device)
    block = int(means.argmax())
    worst = math.sqrt(float(means[block]) / (power / plan.elements))
    return math.sqrt(float(per_block.sum()) / power), block, worst


def _pieces(plan: Plan) -> Iterator[tuple[int, int, int, Callable]]:
    """Cut a flattened matrix into pieces that stay in a cache.

    Yields first and last element, the first block in it, and what gives the sums of its blocks.
    """
    r, c = plan.block
    if r == 0 and c > _PIECE:
        for block in range(plan.blocks):
            last = min((block + 1) * c, plan.elements)
            for start in range(block * c, last, _PIECE):
                yield start, min(start + _PIECE, last), block, lambda part: part.sum().view(1)
        return
    full = c if r == 0 else r * plan.columns  # a block, or a row of tiles
    step = full * max(1, _PIECE // full)
    width = 1 if r == 0 else -(-plan.columns // c)
    for start in range(0, plan.elements, step):
        stop = min(start + step, plan.elements)

        def sums(part):
            part = part.view(1, -1) if r == 0 else part.view(-1, plan.columns)
            return to_blocks(part, plan.block, 0.0).sum(1)

        yield start, stop, start // full * width, sums


def _sizes(plan, device) -> torch.Tensor:
    """The number of elements of each block [blocks], float64."""
    r, c = plan.block
    if r == 0:
        sizes = torch.full((plan.blocks,), c, dtype=torch.float64, device=device)
        sizes[-1] = plan.elements - c * (plan.blocks - 1)
        return sizes
    down = torch.full((-(-plan.rows // r),), r, dtype=torch.float64, device=device)
    across = torch.full((-(-plan.columns // c),), c, dtype=torch.float64, device=device)
    down[-1] = plan.rows - r * (len(down) - 1)
    across[-1] = plan.columns - c * (len(across) - 1)
    return torch.outer(down, across).view(-1)


def _by_name(layers) -> list[list[LayerReport]]:
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(layer.name, []).append(layer)
    return list(groups.values())


def _cells(group: list[LayerReport]) -> tuple[str, ...]:
    worst = max(group, key=lambda layer: layer.error)
    shape = " x ".join(map(str, worst.shape))
    before = sum(layer.bytes_before for layer in group)
    after = sum(layer.bytes_after for layer in group)
    kept = sum(len(layer.super_weights) + layer.largest for layer in group)
    return (
        group[0].name,
        shape if worst.expert is None else f"{len(group)} x {shape}",
        str(worst.bits),
        f"{worst.error:.2%}",
        f"{worst.worst_error:.2%} ({worst.worst_block})",
        str(kept),
        f"{after / before:.1%}",
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
