"""Configurations that `swkernels tune` tries, by operation, architecture, dtype and tokens.

A list is a guess at what may be best, so it is short: time on a GPU decides. Nothing here is used
when a kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "tfloat32": 4}
_WARP_READ = 512  # bytes that a warp reads at once, 16 a thread
_FEW, _SOME = 16, 64  # tokens; buckets for which tiles are small


@dataclass(frozen=True)
class Candidate:
    """A variant of an operation in one configuration."""

    variant: str
    settings: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, variant: str, config: Mapping[str, int]) -> Candidate:
        return cls(variant, tuple(config.items()))

    @property
    def config(self) -> dict[str, int]:
        """The configuration as a tuning record has it."""
        return dict(self.settings)

    def __str__(self) -> str:
        return " ".join([self.variant, *(f"{name}={value}" for name, value in self.settings)])


def candidates(
    op: str, architecture: str, dtype: str, bucket: int, shared_memory: int
) -> list[Candidate]:
    """Return what to try, without what the device's shared memory obviously cannot hold.

    Args:
        op: name of the operation.
        architecture: "sm_90", "gfx942", ..., or "interpreter".
        dtype: as a tuning record spells it.
        bucket: of the tokens, see `tuning.token_bucket`.
        shared_memory: bytes that one program may use.
    """
    if op == "linear_absmax":
        found = _linear(architecture, dtype, bucket)
        fitting = [c for c in found if _shared(c, dtype) <= shared_memory]
        return list(dict.fromkeys([Candidate("two_pass", ()), *fitting]))
    shapes = _INTERPRETED_ROWS if architecture == "interpreter" else _ROWS[op][bucket > _SOME]
    return list(dict.fromkeys(_rows(shapes, architecture, dtype)))


# (BLOCK_T, BLOCK_C in units of what a warp reads at once, warps) and the waves to try with it, for
# few tokens and for many. `waves` is no part of the binary: trying several compiles nothing more.
_ROWS = {
    "column_absmax": (
        [
            ((4, 1, 1), (4, 16)),
            ((8, 1, 2), (4, 16)),
            ((4, 0.5, 1), (4, 16)),
            ((8, 0.5, 1), (4, 16)),
            ((16, 0.5, 2), (4, 16)),
            ((8, 1, 4), (4, 16)),
            ((16, 1, 4), (4, 16)),
        ],
        [
            ((16, 1, 4), (2, 4, 8, 16)),
            ((8, 1, 4), (4, 8, 16)),
            ((16, 1, 8), (2, 4, 8)),
            ((16, 2, 8), (2, 4)),
            ((8, 2, 4), (4, 8)),
            ((4, 2, 4), (4, 8)),
            ((32, 0.5, 4), (4, 8)),
        ],
    ),
    "glu_absmax": (
        [
            ((2, 1, 1), (4, 16)),
            ((4, 1, 2), (4, 16)),
            ((4, 0.5, 1), (4, 16)),
            ((8, 0.5, 2), (4, 16)),
            ((4, 1, 4), (4, 16)),
            ((8, 1, 4), (4, 16)),
        ],
        [
            ((8, 1, 4), (2, 4, 8, 16)),
            ((4, 1, 4), (4, 8, 16)),
            ((16, 1, 8), (2, 4, 8)),
            ((8, 2, 8), (2, 4)),
            ((4, 2, 4), (4, 8)),
            ((16, 0.5, 4), (4, 8)),
        ],
    ),
}
_INTERPRETED_ROWS = [((4, 0.25, 0), (1,)), ((8, 0.5, 0), (2,))]


def _rows(shapes, architecture: str, dtype: str) -> Iterator[Candidate]:
    unit = _WARP_READ // _SIZE[dtype]
    # A wavefront has 64 lanes: half as many of them hold the same tile in as many registers.
    share = 2 if architecture.startswith("gfx") else 1
    for (block_t, units, warps), all_waves in shapes:
        for waves in all_waves:
            config = {"BLOCK_T": block_t, "BLOCK_C": int(units * unit), "waves": waves}
            if warps:
                config["num_warps"] = max(1, warps // share)
            yield Candidate.of("rows", config)


# (BLOCK_T, BLOCK_D, bytes of a row of a tile: BLOCK_H, warps, stages), the likeliest first.
_HOPPER = {
    _FEW: [(16, 128, 256, 4, 4), (16, 64, 256, 4, 6), (16, 64, 512, 4, 4), (16, 128, 128, 4, 6)],
    _SOME: [(64, 64, 256, 4, 4), (64, 128, 128, 4, 4), (32, 64, 256, 4, 4), (64, 64, 128, 4, 6)],
    None: [
        (128, 128, 128, 8, 4),
        (128, 128, 128, 8, 3),
        (128, 128, 256, 8, 2),
        (64, 256, 128, 8, 4),
        (64, 128, 128, 4, 4),
        (128, 64, 128, 4, 4),
    ],
}
_AMPERE = {
    _FEW: [(16, 64, 256, 4, 4), (16, 128, 128, 4, 4), (16, 64, 128, 4, 5), (16, 32, 256, 4, 4)],
    _SOME: [(64, 64, 128, 4, 4), (32, 64, 128, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 5)],
    None: [
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 128, 8, 3),
        (64, 256, 64, 8, 4),
        (64, 128, 64, 4, 4),
        (128, 64, 64, 4, 4),
        (64, 128, 128, 4, 3),
        (128, 64, 128, 4, 3),
    ],
}
_CDNA = {
    _FEW: [(16, 64, 128, 4, 2), (16, 128, 128, 4, 2), (16, 64, 256, 4, 2), (16, 32, 256, 4, 2)],
    _SOME: [(64, 64, 128, 4, 2), (32, 64, 128, 4, 2), (64, 128, 64, 4, 2), (64, 64, 64, 4, 2)],
    None: [
        (128, 128, 64, 8, 2),
        (64, 128, 64, 4, 2),
        (128, 64, 64, 4, 2),
        (64, 128, 128, 4, 2),
        (64, 64, 128, 4, 2),
    ],
}
# float32 without TF32 is multiplied in registers, one product at a time.
_FLOAT32 = {
    _FEW: [(16, 64, 256, 4, 2), (16, 128, 128, 4, 2), (16, 64, 128, 4, 3), (16, 32, 256, 4, 3)],
    _SOME: [(64, 64, 128, 4, 3), (32, 64, 128, 4, 3), (64, 64, 64, 4, 3), (32, 128, 64, 4, 3)],
    None: [
        (64, 128, 128, 8, 3),
        (128, 64, 128, 8, 3),
        (64, 64, 128, 4, 3),
        (64, 64, 64, 4, 3),
        (64, 128, 64, 8, 3),
        (128, 128, 64, 8, 3),
    ],
}
_INTERPRETED = {None: [(16, 16, 128, 0, 0), (16, 32, 64, 0, 0)]}
_GROUPS = (8, 16)  # of the likeliest tiles; the others are tried with the first


def _linear(architecture: str, dtype: str, bucket: int) -> Iterator[Candidate]:
    variants, shapes = ("pointers",), _AMPERE
    if architecture == "interpreter":
        variants, shapes = ("descriptors", "pointers"), _INTERPRETED
    elif dtype == "float32":
        shapes = _FLOAT32
    elif architecture.startswith("gfx"):
        shapes = _CDNA
    elif architecture.startswith(("sm_90", "sm_10")):  # those with tensor memory accelerators
        variants, shapes = ("descriptors", "pointers"), _HOPPER
    tiles = shapes.get(bucket, shapes[None])
    # Between few and many tokens small tiles fill the device better.
    if bucket == 256 and _SOME in shapes:
        tiles = [*tiles[:1], *tiles[3:], *shapes[_SOME]]
    for variant in variants:
        for place, tile in enumerate(tiles):
            for group in _GROUPS if place < 2 and bucket > 256 else _GROUPS[:1]:
                yield from _fused(variant, architecture, dtype, tile, group)


def _fused(variant, architecture, dtype, tile, group) -> Iterator[Candidate]:
    block_t, block_d, row_bytes, warps, stages = tile
    config = {"BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_H": row_bytes // _SIZE[dtype]}
    config["GROUP_T"] = group
    if warps:
        # Triton 3.6 cannot compile descriptors with 8 warps for sm_100 and sm_103.
        if variant == "descriptors" and architecture.startswith("sm_10"):
            warps = 4
        config |= {"num_warps": warps, "num_stages": stages}
    if architecture.startswith("gfx"):
        config["matrix_instr_nonkdim"] = 16  # 32 spills
    yield Candidate.of(variant, config)


def _shared(candidate: Candidate, dtype: str) -> int:
    """Bytes of shared memory that the tiles in flight need at least."""
    config = candidate.config
    side = config["BLOCK_T"] + config["BLOCK_D"]
    stages = max(1, config.get("num_stages", 1) - 1)  # some targets hold the last in registers
    return stages * side * config["BLOCK_H"] * _SIZE[dtype]
