"""What of a model is quantized, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase

import torch

from swkernels.backends.plan import CODES, Clip, Code, plan_of
from swkernels.errors import InvalidInput

_OUTLIER_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16
}  # fmt: skip


@dataclass(frozen=True)
class QuantConfig:
    """How ``swkernels.quantize`` packs a model; what a field means is said at ``block_quantize``.

    Attributes:
        code: "int4", "int8", "nf4" or "fp4".
        symmetric: False gives integer codes a zero point in each block.
        block_size: elements of the flattened matrix, (rows, columns) of a tile, "row", "channel"
            or "tensor". A matrix is [D, H] whatever way its layer keeps it.
        clip: how ranges are cut; None: not at all.
        scale_dtype: "float32", "float16" or "int8".
        largest: how many of the largest magnitudes are kept exactly, beside the super weights.
        largest_per: of every "tensor" or of every "block".
        outlier_dtype: "float32", "bfloat16" or "float16" for what is kept; None: the weight's.
        include: patterns of the layers to quantize; None: every linear layer of the text blocks
            but routers. "*" and "?" stand for anything, and a pattern may be the end of a name:
            "down_proj", "layers.0.*", "mlp.experts".
        exclude: patterns of those that are left as they are.
        embeddings: a code for the input embeddings and the head; None: both stay as they are.

    Raises:
        InvalidInput: a field that is not as above.
    """

    code: str = "int4"
    symmetric: bool = True
    block_size: int | tuple[int, int] | str = 64
    clip: Clip | None = None
    scale_dtype: str = "float32"
    largest: int = 0
    largest_per: str = "tensor"
    outlier_dtype: str | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    embeddings: str | None = None

    def __post_init__(self):
        if not isinstance(self.symmetric, bool):
            raise InvalidInput(f"symmetric must be True or False, got {self.symmetric!r}")
        if isinstance(self.block_size, list):
            object.__setattr__(self, "block_size", tuple(self.block_size))
        plan_of(
            (1, 1), code=self.code, symmetric=self.symmetric, block_size=self.block_size,
            clip=self.clip, scale_dtype=self.scale_dtype,
        )  # fmt: skip
        if type(self.largest) is not int or self.largest < 0:
            raise InvalidInput(f"largest must be an integer from 0, got {self.largest!r}")
        if self.largest_per not in ("tensor", "block"):
            raise InvalidInput(f"largest_per must be 'tensor' or 'block', got {self.largest_per!r}")
        if self.outlier_dtype not in (None, *_OUTLIER_DTYPES):
            raise InvalidInput(
                f"outlier_dtype must be None, {', '.join(_OUTLIER_DTYPES)}, got "
                f"{self.outlier_dtype!r}"
            )
        if self.embeddings not in (None, *CODES):
            raise InvalidInput(
                f"embeddings must be None or one of {', '.join(CODES)}, got {self.embeddings!r}"
            )
        if self.include is not None:
            object.__setattr__(self, "include", _patterns("include", self.include))
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))

    @property
    def bits(self) -> int:
        """The bits of a code."""
        return Code(self.code, self.symmetric).bits

    def arguments(self) -> dict:
        """The keywords of ``block_quantize``."""
        return {
            "code": self.code,
            "symmetric": self.symmetric,
            "block_size": self.block_size,
            "clip": self.clip,
            "scale_dtype": self.scale_dtype,
            "largest": self.largest,
            "largest_per": self.largest_per,
            "outlier_dtype": _OUTLIER_DTYPES.get(self.outlier_dtype),
        }

    def of_embeddings(self) -> QuantConfig:
        """The same with the code of the embeddings."""
        symmetric = self.symmetric or Code(self.embeddings).table is not None
        return replace(self, code=self.embeddings, symmetric=symmetric)

    def to_dict(self) -> dict:
        """The fields as JSON knows them."""
        data = asdict(self)
        for name in ("block_size", "include", "exclude"):
            if isinstance(data[name], tuple):
                data[name] = list(data[name])
        return data

    @classmethod
    def from_dict(cls, data: Mapping) -> QuantConfig:
        """The config that ``to_dict`` wrote; fields that are missing have their defaults.

        Raises:
            InvalidInput: no mapping, a field that is unknown, or a value that is wrong.
        """
        if not isinstance(data, Mapping):
            raise InvalidInput(f"expected the fields of a QuantConfig, got {type(data).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = [name for name in data if name not in known]
        if unknown:
            raise InvalidInput(f"unknown field {unknown[0]!r}: expected {', '.join(known)}")
        given = dict(data)
        clip = given.get("clip")
        if isinstance(clip, Mapping):
            if set(clip) != {"by", "value"}:
                raise InvalidInput(f"clip must have by and value, got {', '.join(clip) or 'none'}")
            given["clip"] = Clip(**clip)
        return cls(**given)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is the name, or an end of it that begins at a dot."""
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in patterns)


def _patterns(field: str, given: object) -> tuple[str, ...]:
    listed = (given,) if isinstance(given, str) else given
    if not isinstance(listed, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) and pattern for pattern in listed
    ):
        raise InvalidInput(f"{field} must be patterns of names, got {given!r:.200}")
    return tuple(listed)
