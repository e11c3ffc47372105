"""What a launch needs to know of the device: can it run, how many programs, which tuning record."""

from __future__ import annotations

from functools import cache

import torch

from swkernels import tuning

from . import interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_CAPABILITY = (8, 0)  # bfloat16 in hardware
_INTERPRETED_MULTIPROCESSORS = 3  # few and odd, so that small tests reach the persistent loops


def refusal(*tensors: torch.Tensor | None) -> str | None:
    """Return why the kernels cannot take `tensors` (those that are not None), or None."""
    given = [tensor for tensor in tensors if tensor is not None]
    device, dtype = given[0].device, given[0].dtype
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"it takes CUDA or ROCm tensors, got one on {device}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    for tensor in given:
        if tensor.dtype != dtype or tensor.device != device:
            return (
                f"its tensors must share dtype and device, got {dtype} on {device} "
                f"and {tensor.dtype} on {tensor.device}"
            )
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_CAPABILITY:
            return f"it needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    return None


if interpreted():
    from . import _interpreter

    _interpreter.mend()


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors (compute units) of `device`."""
    if device.type == "cpu":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def names(device: torch.device) -> tuple[str, str]:
    """Name and architecture of `device`, as tuning records spell them."""
    if device.type == "cpu":
        return "interpreter", "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.name, properties.gcnArchName.split(":")[0]
    return properties.name, f"sm_{properties.major}{properties.minor}"


def choose(
    op: str,
    tensor: torch.Tensor,
    rows: int,
    columns: int,
    tokens: int,
    *,
    dtype: str | None = None,
    variant: str | None = None,
) -> tuning.Choice:
    """Return the tuning record for `op` on `tensor`'s device, in its dtype if none is given."""
    device_name, architecture = names(tensor.device)
    dtype = dtype or str(tensor.dtype).removeprefix("torch.")
    return tuning.lookup(
        op, device_name, rows, columns, tokens, dtype, architecture=architecture, variant=variant
    )


def split_rows(
    T: int, C: int, device: torch.device, *, BLOCK_T: int, BLOCK_C: int, waves: int
) -> tuple[tuple[int, int], int]:
    """Return the grid (column blocks, row chunks) and the tiles of BLOCK_T rows of one chunk.

    As many programs as fill the device `waves` times, each with a chunk of whole tiles: every
    program then issues one atomic per channel, however long the tensor is.
    """
    blocks = -(-C // BLOCK_C)
    tiles = -(-T // BLOCK_T)
    chunks = max(1, min(tiles, waves * multiprocessors(device) // blocks))
    per_chunk = -(-tiles // chunks)
    return (blocks, -(-tiles // per_chunk)), per_chunk
