"""What each operation must at least do, and how long that takes on a given machine.

The floor of a piece of work is the larger of two times: its matrix FLOP over the rate of the
matrix units, and its least bytes (each input read once, each output written once) over the memory
bandwidth. No implementation is much faster; its measured time over the floor is its distance to
the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.shapes import Projection, projections

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
_KEY = 8  # bytes of a channel's running key


@dataclass(frozen=True)
class Work:
    """FLOP of matrix products (two per multiply-add), bytes that are read and written, and the
    bandwidth to hold them against."""

    flop: float
    read: int
    write: int
    memory: str = "copy"


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a pure read, of a copy (read and written), FLOP/s by dtype."""

    read: float
    copy: float
    gemm: dict[str, float]


# Vendors' figures: H100 SXM5 80 GB and H200 SXM data sheets, dense tensor cores, boost clock. A
# float32 product here is one in IEEE float32, without tensor cores.
_HOPPER = {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12}
PUBLISHED = {
    "H100 SXM": Ceilings(3.35e12, 3.35e12, _HOPPER),
    "H200 SXM": Ceilings(4.8e12, 4.8e12, _HOPPER),
}


def column_absmax(tokens: int, columns: int, dtype: str) -> tuple[Work, ...]:
    """Read x [T, C] once, read and write the keys."""
    read = tokens * columns * ITEM[dtype] + columns * _KEY
    return (Work(0, read, columns * _KEY, "read"),)


def glu_absmax(tokens: int, columns: int, dtype: str) -> tuple[Work, ...]:
    """Read gate and up [T, C], write h [T, C], read and write the keys."""
    size = tokens * columns * ITEM[dtype]
    return (Work(0, 2 * size + columns * _KEY, size + columns * _KEY),)


def linear_absmax(tokens: int, rows: int, columns: int, dtype: str) -> tuple[Work, ...]:
    """The product x W^T of x [T, H] and W [D, H], and the keys of both sides."""
    item, keys = ITEM[dtype], (rows + columns) * _KEY
    read = (tokens * columns + rows * columns) * item + keys
    return (Work(2 * tokens * rows * columns, read, tokens * rows * item + keys),)


def sampled_grad(tokens: int, rows: int, columns: int, k: int, dtype: str) -> tuple[Work, ...]:
    """Read the columns of dy [T, D] and x [T, H] that k coordinates can name, write k sums."""
    named = min(k, rows) + min(k, columns)
    return (Work(2 * tokens * k, tokens * named * ITEM[dtype] + k * 8, k * 4, "read"),)


def sparse_linear(tokens: int, rows: int, columns: int, k: int, dtype: str) -> tuple[Work, ...]:
    """Read the named columns of x [T, H], read and write those of y [T, D]."""
    read = tokens * (min(k, columns) + min(k, rows)) * ITEM[dtype] + k * 12
    return (Work(2 * tokens * k, read, tokens * min(k, rows) * ITEM[dtype]),)


def lora_attention(tokens: int, width: int, kv: int, r: int, dtype: str) -> tuple[Work, ...]:
    """Forward and backward of frozen q, k, v and o and of their LoRA.

    Read the inputs [T, width] of q, k, v and of o, the weights and the outputs' gradients twice
    (for the two passes), write the outputs and the gradients of the inputs.
    """
    rows, item = 2 * (width + kv), ITEM[dtype]
    base = 2 * 2 * tokens * rows * width
    low_rank = 6 * tokens * r * (rows + 4 * width)
    read = (4 * tokens * width + 2 * rows * width + tokens * rows) * item
    return (Work(base + low_rank, read, (tokens * rows + 2 * tokens * width) * item),)


def topk_low_rank(modules: int, width: int, r: int, k: int, dtype: str) -> tuple[Work, ...]:
    """The products B A [width, width], which are not written, and k entries."""
    factors = 2 * modules * width * r * ITEM[dtype]
    return (Work(2 * modules * width * width * r, factors, 16 * k, "read"),)


def topk_abs(matrices: int, rows: int, columns: int, k: int, dtype: str) -> tuple[Work, ...]:
    """Read the matrices [D, H] once, write k values, each with its matrix, row and column."""
    return (Work(0, matrices * rows * columns * ITEM[dtype], k * 28, "read"),)


def packed_bytes(rows: int, columns: int, bits: int, block: int) -> int:
    """Bytes of the codes and the float32 scales of a packed matrix [D, H]."""
    elements = rows * columns
    return -(-elements * bits // 8) + -(-elements // block) * 4


def block_quantize(rows: int, columns: int, bits: int, block: int, dtype: str) -> tuple[Work, ...]:
    """Read w [D, H] once, write codes and scales."""
    return (Work(0, rows * columns * ITEM[dtype], packed_bytes(rows, columns, bits, block)),)


def block_dequantize(
    rows: int, columns: int, bits: int, block: int, dtype: str
) -> tuple[Work, ...]:
    """Read codes and scales, write w [D, H]."""
    return (Work(0, packed_bytes(rows, columns, bits, block), rows * columns * ITEM[dtype]),)


def quant_linear(
    tokens: int, rows: int, columns: int, bits: int, block: int, dtype: str
) -> tuple[Work, ...]:
    """The product x W^T of x [T, H] and a packed W [D, H]."""
    read = tokens * columns * ITEM[dtype] + packed_bytes(rows, columns, bits, block)
    return (Work(2 * tokens * rows * columns, read, tokens * rows * ITEM[dtype]),)


def swiglu_mlp(tokens: int, rows: int, columns: int, dtype: str) -> tuple[Work, ...]:
    """gate and up projections [H, D], the gated product, the down projection [D, H], one by one."""
    up = linear_absmax(tokens, columns, rows, dtype)
    down = linear_absmax(tokens, rows, columns, dtype)
    return (*up, *up, *glu_absmax(tokens, columns, dtype), *down)


def floor(work: Sequence[Work], ceilings: Ceilings, dtype: str) -> tuple[float, str]:
    """Seconds of the pieces one after the other, and the ceiling that binds most of them."""
    spent = {"read": 0.0, "copy": 0.0, "gemm": 0.0}
    for piece in work:
        times = {
            piece.memory: (piece.read + piece.write) / getattr(ceilings, piece.memory),
            "gemm": piece.flop / ceilings.gemm[dtype],
        }
        binding = max(times, key=times.get)
        spent[binding] += times[binding]
    return sum(spent.values()), max(spent, key=spent.get)


_PREDICTED_MODELS = ("SmolLM2-135M", "Llama-3-8B", "Llama-3-70B")
_PREDICTED_TOKENS = (16, 4096, 16384)
_PREDICTED_COUNT = 4096  # coordinates of sparse training
_PREDICTED_BLOCK = 64  # of int4


def predicted_rows(dtype: str = "bfloat16") -> list[dict]:
    """The floors on the published machines, for the down projections that records are held to.

    Returns a list of {"op", "models", "projection", "shape", "dtype", "flop", "bytes",
    "seconds": {machine: seconds}}.
    """
    rows = []
    for projection in projections(("down_proj",)):
        if projection.models[0] in _PREDICTED_MODELS:
            for tokens in _PREDICTED_TOKENS:
                rows += _predicted(projection, tokens, dtype)
    return rows


def _predicted(projection: Projection, tokens: int, dtype: str) -> list[dict]:
    D, H = projection.rows, projection.columns
    narrow, wide = {"tokens": tokens, "columns": H}, {"tokens": tokens, "columns": H, "rows": D}
    listed, packed = {**wide, "k": _PREDICTED_COUNT}, {**wide, "block": _PREDICTED_BLOCK}
    works = {
        "column_absmax": (narrow, column_absmax(tokens, H, dtype)),
        "glu_absmax": (narrow, glu_absmax(tokens, H, dtype)),
        "linear_absmax": (wide, linear_absmax(tokens, D, H, dtype)),
        "tracked_mlp": (wide, swiglu_mlp(tokens, D, H, dtype)),
        "sampled_grad": (listed, sampled_grad(tokens, D, H, _PREDICTED_COUNT, dtype)),
        "sparse_linear": (listed, sparse_linear(tokens, D, H, _PREDICTED_COUNT, dtype)),
        "quant_linear": (packed, quant_linear(tokens, D, H, 4, _PREDICTED_BLOCK, dtype)),
    }
    return [
        {
            "op": op,
            "models": list(projection.models),
            "projection": projection.name,
            "shape": shape,
            "dtype": dtype,
            "flop": sum(piece.flop for piece in work),
            "bytes": sum(piece.read + piece.write for piece in work),
            "seconds": {
                name: floor(work, ceilings, dtype)[0] for name, ceilings in PUBLISHED.items()
            },
        }
        for op, (shape, work) in works.items()
    ]
