"""Matrices to quantize, and the ways to do it."""

from __future__ import annotations

import numpy as np
import torch

from swkernels import ops

from . import quant_oracle as oracle
from .backends_here import DEVICE
from .listed import normal

CODES = [
    ("int4", True), ("int4", False), ("int8", True), ("int8", False), ("nf4", True), ("fp4", True),
]  # fmt: skip
CODE_NAMES = [name if symmetric else f"{name} asymmetric" for name, symmetric in CODES]
BLOCKS = [64, 7, 1, 10_000, (8, 16), (5, 3), (1, 9), "row", "channel", "tensor"]
CLIPS = [
    None, ("zscore", 1.5), ("zscore", 0), ("zscore_signed", 1.0), ("percentile", 90),
    ("percentile", 7), ("count", 2), ("count", 1000), ("search", 0.5),
]  # fmt: skip
SCALE_DTYPES = ["float32", "float16", "int8"]


def interpreted(backend) -> bool:
    """Whether Triton's interpreter runs the kernels, which takes a thousand times as long."""
    return backend == "triton" and DEVICE == "cpu"


def some_of(backend, cases, every: int) -> list:
    """The cases for ``backend``: all of them, or every so-manieth for the interpreter."""
    return list(cases)[:: every if interpreted(backend) else 1]


def heavy(D, H, dtype=torch.float32, seed=0, scale=0.02):
    """Weights with heavy tails of either sign, and one that is far beyond the others."""
    w = normal(D, H, seed=seed) ** 3 * scale
    if w.numel():
        w.view(-1)[w.numel() // 2] = 50 * scale
    return w.to(dtype)


def clip_of(clip):
    return clip and ops.Clip(*clip)


def quantize(w, code="int4", symmetric=True, block=64, clip=None, scale_dtype="float32", **more):
    return ops.block_quantize(
        w, code=code, symmetric=symmetric, block_size=block, clip=clip_of(clip),
        scale_dtype=scale_dtype, **more,
    )  # fmt: skip


def expected(w, code, symmetric, block, clip=None, scale_dtype="float32", apart=()):
    wide = w.detach().float().cpu().numpy()
    return oracle.quantize(wide, code, symmetric, block, clip, scale_dtype, apart)


def values_of(packed: oracle.Packed, w, code, symmetric, apart=()) -> torch.Tensor:
    """The float32 values that the oracle's codes stand for, exact at the positions ``apart``."""
    values = torch.from_numpy(oracle.dequantize(packed, code, symmetric)).to(DEVICE)
    values[list(apart)] = w.float().reshape(-1)[list(apart)]
    return values.view(w.shape)


def assert_packed(q, wanted: oracle.Packed, code):
    """Every byte of ``q`` is what the oracle says."""
    np.testing.assert_array_equal(q.block_scales().float().cpu().numpy(), wanted.scales)
    if wanted.zeros is None:
        assert q.zero_points is None
    else:
        np.testing.assert_array_equal(q.zero_points.cpu().numpy(), wanted.zeros)
    assert q.codes.dtype == torch.uint8 and q.codes.tolist() == oracle.pack(wanted.codes, code)


def assert_same(q, other):
    """Every tensor of two packed matrices is the same, of the same type."""
    ours, theirs = q.tensors(), other.tensors()
    assert ours.keys() == theirs.keys() and q.plan == other.plan and q.shape == other.shape
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
