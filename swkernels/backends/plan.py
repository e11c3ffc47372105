"""How a matrix is quantized: its codes, its blocks, how their ranges are cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swkernels.errors import InvalidInput

# The 4-bit tables of bitsandbytes (QLoRA, arXiv 2305.14314, appendix E; FP4 has 2 exponent bits
# and 1 of mantissa, divided by its largest value), as float32 rounds them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
    0.1666666716337204, 0.25, 0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
    -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)  # fmt: skip
# The codes of FP4 in ascending order of their values; of its two zeros, code 0 takes what is not
# above 0.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

CODES = ("int4", "int8", "nf4", "fp4")
SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.uint8}
# Of an asymmetric code: the zero points' type, and the exponent e of the least scale 2^-e max|w|,
# which keeps zero points in that type where a block lies far from zero.
ZERO_POINTS = {
    "float32": (torch.int32, 20),
    "float16": (torch.int16, 13),
    "int8": (torch.int16, 13),
}
MOST_ELEMENTS = 2**31 - 1  # positions are int32


@dataclass(frozen=True)
class Code:
    """A set of values that weights are rounded to.

    Attributes:
        name: one of ``CODES``.
        symmetric: whether zero has a code of its own; an asymmetric code has a zero point a block.
    """

    name: str
    symmetric: bool = True

    def __post_init__(self):
        if self.name not in CODES:
            raise InvalidInput(f"unknown code {self.name!r}: expected one of {', '.join(CODES)}")
        if not self.symmetric and self.table is not None:
            raise InvalidInput(f"{self.name} is symmetric: symmetric=False goes with int4 and int8")

    @property
    def bits(self) -> int:
        return 8 if self.name == "int8" else 4

    @property
    def table(self) -> tuple[float, ...] | None:
        """The value of each code before the scale; None where codes are integers."""
        return {"nf4": NF4, "fp4": FP4}.get(self.name)

    @property
    def order(self) -> tuple[int, ...] | None:
        """The codes of the table in ascending order of their values."""
        return {"nf4": tuple(range(16)), "fp4": _FP4_ORDER}.get(self.name)

    @property
    def steps(self) -> int:
        """What the largest magnitude (symmetric) or the whole range (asymmetric) is divided by."""
        if self.table is not None:
            return 1
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def zero(self) -> int:
        """The code of 0, which is stored at outliers; asymmetric codes, too, have a 0 there.

        int4 is stored with 8 added, int8 as the two's complement that integer products take.
        """
        if self.table is not None:
            return self.table.index(0.0)
        return 8 if self.symmetric and self.bits == 4 else 0


CLIPS = ("zscore", "zscore_signed", "percentile", "count", "search")


@dataclass(frozen=True)
class Clip:
    """How the range of a block is cut before it is quantized; values outside end at its bounds.

    Attributes:
        by: "zscore": magnitudes up to mean + value * std of |w| (arXiv 2411.07191, the authors'
            code); "zscore_signed": w within mean -+ value * std of w; "percentile": magnitudes up
            to the one of that rank (nearest rank, of 100); "count": so many of the largest
            magnitudes are cut to the next one; "search": the range is multiplied by the factor
            of 1, 0.975, 0.95, ... down to value that gives the least squared error.
        value: see above.
    """

    by: str
    value: float

    def __post_init__(self):
        if self.by not in CLIPS:
            raise InvalidInput(f"unknown clip {self.by!r}: expected one of {', '.join(CLIPS)}")
        value = self.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidInput(f"the value of a clip must be a number, got {value!r}")
        expected = {
            "zscore": ("at least 0", value >= 0),
            "zscore_signed": ("at least 0", value >= 0),
            "percentile": ("above 0 and at most 100", 0 < value <= 100),
            "count": (
                "an integer from 0 to 2^31 - 1",
                0 <= value <= MOST_ELEMENTS and float(value).is_integer(),
            ),
            "search": ("above 0 and at most 1", 0 < value <= 1),
        }[self.by]
        if not expected[1] or value == float("inf"):
            raise InvalidInput(f"the value of clip {self.by!r} must be {expected[0]}, got {value}")

    @property
    def factors(self) -> tuple[float, ...]:
        """Of "search": what the range is multiplied by, as float32 rounds it."""
        count = int((1 - self.value) / 0.025 + 1e-9) + 1
        return tuple(torch.tensor([1 - 0.025 * i for i in range(count)]).tolist())


@dataclass(frozen=True)
class Plan:
    """How a matrix is cut and coded.

    Attributes:
        rows, columns: of the matrix [D, H].
        block: (0, n): runs of n elements of the flattened matrix, the last one shorter where n
            does not divide; (r, c): tiles, smaller at the lower and right border. Blocks are
            numbered in the order of their first elements.
        code: what is stored of an element.
        clip: how ranges are cut, or None.
        scale_dtype: "float32", "float16", or "int8": scales that are quantized themselves.
    """

    rows: int
    columns: int
    block: tuple[int, int]
    code: Code
    clip: Clip | None = None
    scale_dtype: str = "float32"

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def blocks(self) -> int:
        r, c = self.block
        if r == 0:
            return -(-self.elements // c)
        return -(-self.rows // r) * -(-self.columns // c) if self.elements else 0

    @property
    def code_bytes(self) -> int:
        return self.elements if self.code.bits == 8 else -(-self.elements // 2)

    @property
    def block_elements(self) -> int:
        """The elements of a full block."""
        r, c = self.block
        return max(r, 1) * c


def plan_of(shape, *, code, symmetric, block_size, clip, scale_dtype) -> Plan:
    """Check the arguments of ``block_quantize`` and resolve them for a matrix of ``shape``.

    Raises:
        InvalidInput: an argument that is not what it should be, or a matrix that is too large.
    """
    if scale_dtype not in SCALE_DTYPES:
        raise InvalidInput(
            f"unknown scale_dtype {scale_dtype!r}: expected one of {', '.join(SCALE_DTYPES)}"
        )
    if clip is not None and not isinstance(clip, Clip):
        raise InvalidInput(f"clip must be None or a Clip, got {clip!r}")
    *leading, columns = shape
    rows = 1
    for size in leading:
        rows *= size
    if rows * columns > MOST_ELEMENTS:
        raise InvalidInput(
            f"a quantized matrix has at most 2^31 - 1 elements, got {list(shape)}: quantize its "
            "parts, such as experts, one by one"
        )
    return Plan(
        rows, columns, _block(block_size, rows, columns), Code(code, symmetric), clip, scale_dtype
    )


def _block(size, rows: int, columns: int) -> tuple[int, int]:
    named = {
        "row": (0, max(columns, 1)),
        "channel": (max(rows, 1), 1),
        "tensor": (0, max(rows * columns, 1)),
    }
    if isinstance(size, str) and size in named:
        return named[size]
    parts = size if isinstance(size, (tuple, list)) else (size,)
    if len(parts) in (1, 2) and all(type(part) is int and part > 0 for part in parts):
        if len(parts) == 1:
            return (0, min(parts[0], max(rows * columns, 1)))
        return (min(parts[0], max(rows, 1)), min(parts[1], max(columns, 1)))
    raise InvalidInput(
        "block_size must be a positive integer (elements of the flattened matrix), a pair of "
        f"them (rows, columns of a tile), 'row', 'channel' or 'tensor', got {size!r}"
    )
