"""Other packages' 4-bit weights: their tensors among the inputs of a case, and calls on them.

What a package packs is made with the inputs and copied with them, so that its weights are as cold
as ours.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from benchmarks.case import Call, Provider, Tensors, peer

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LAYOUT_ROWS = 32  # the layout for AVX-512 takes rows in so many
_GEMLITE_MULTIPLE = 32  # of inputs and outputs


def bitsandbytes(name: str, call: Call, code: str, block: int, device: torch.device) -> Provider:
    """Its NF4, on a CPU and on CUDA."""
    refusal = None
    if code != "nf4":
        refusal = f"bitsandbytes has no {code} with a scale a block"
    elif block not in _BLOCKS:
        refusal = f"bitsandbytes has blocks up to {_BLOCKS[-1]}"
    return peer(name, "bitsandbytes", device, call, devices=("cpu", "cuda"), refusal=refusal)


def nf4_values(codes, scales, rows: int, columns: int, block: int, dtype: torch.dtype):
    """bitsandbytes' values of its NF4 codes, which are ours: [rows, columns]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(codes.view(-1, 1), _state(scales, rows, columns, block, dtype))


def nf4_linear(x, codes, scales, rows: int, block: int) -> torch.Tensor:
    """bitsandbytes' product with NF4 codes, for x [T, H]."""
    from bitsandbytes import matmul_4bit

    state = _state(scales, rows, x.shape[-1], block, x.dtype)
    return matmul_4bit(x, codes.view(-1, 1), quant_state=state)


def avx512_refusal(rows: int, columns: int, block: int, device: torch.device) -> str | None:
    """Why bitsandbytes' layout for AVX-512 BF16 does not serve here, or None."""
    if device.type != "cpu" or find_spec("bitsandbytes") is None:
        return "it is a layout of bitsandbytes for CPUs"
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        return "this CPU has no AVX-512 BF16, or bitsandbytes was built without"
    if rows % _LAYOUT_ROWS or columns % block:
        return f"it takes rows in {_LAYOUT_ROWS}s and blocks that divide the columns"
    return None if block in _BLOCKS else f"bitsandbytes has blocks up to {_BLOCKS[-1]}"


def avx512_layout(codes, scales, rows: int, columns: int, block: int) -> Tensors:
    """NF4 codes as Linear4bit lays them out on a CPU with AVX-512 BF16 at its first call."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    state = _state(scales, rows, columns, block, torch.bfloat16)
    laid_out, state = _convert_weight_packed_for_cpu(codes.view(-1, 1), state)
    return {"avx512 codes": laid_out, "avx512 scales": state.absmax}


def avx512_linear(x, inputs: Tensors, rows: int, block: int) -> torch.Tensor:
    """The product of x [T, H] with that layout; bitsandbytes computes it in bfloat16."""
    from bitsandbytes import matmul_4bit

    state = _state(inputs["avx512 scales"], rows, x.shape[-1], block, torch.bfloat16)
    state.packing_format_for_cpu = True
    return matmul_4bit(x, inputs["avx512 codes"], quant_state=state)


def gemlite_refusal(rows: int, columns: int, block: int) -> str | None:
    """Why gemlite does not take a weight, or None."""
    if rows % _GEMLITE_MULTIPLE or columns % block:
        return f"gemlite takes rows in {_GEMLITE_MULTIPLE}s and blocks that divide the columns"
    return None


class Gemlite:
    """gemlite's layer on int4 codes.

    Args:
        rows, columns, block, dtype: of the weight.
    """

    def __init__(self, rows: int, columns: int, block: int, dtype: torch.dtype):
        self.rows, self.columns, self.block, self.dtype = rows, columns, block, dtype
        self._about: list[int] = []

    def tensors(self, codes: torch.Tensor, scales: torch.Tensor) -> Tensors:
        """What it packs of codes [rows, columns] of 0..15, 8 being zero, and scales [blocks]."""
        from gemlite.core import TORCH_TO_DTYPE, GemLiteLinear

        layer = GemLiteLinear(
            4, group_size=self.block, in_features=self.columns, out_features=self.rows,
            input_dtype=TORCH_TO_DTYPE[self.dtype], output_dtype=TORCH_TO_DTYPE[self.dtype],
        )  # fmt: skip
        layer.pack(codes, scales[:, None].to(self.dtype), 8)
        self._about = layer.get_meta_args()
        held = (tensor.detach() for tensor in layer.get_tensor_args())
        return {f"gemlite {place}": tensor for place, tensor in enumerate(held)}

    def linear(self, x: torch.Tensor, inputs: Tensors) -> torch.Tensor:
        """The product of x [T, H] with what ``tensors`` packed."""
        from gemlite.core import forward_functional

        held = [tensor for name, tensor in inputs.items() if name.startswith("gemlite ")]
        return forward_functional(x, None, held, self._about)


def _state(scales, rows, columns, block, dtype):
    from bitsandbytes.functional import QuantState

    return QuantState(
        absmax=scales, shape=torch.Size((rows, columns)), code=_table(scales.device),
        blocksize=block, quant_type="nf4", dtype=dtype,
    )  # fmt: skip


@cache
def _table(device: torch.device) -> torch.Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=device)
