"""What bitsandbytes' layers hold, as packed matrices."""

from __future__ import annotations

import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from torch import nn

from swkernels.backends.blocks import decode, pack
from swkernels.backends.plan import Code, plan_of
from swkernels.errors import InvalidInput
from swkernels.ops import QuantizedTensor

_CPU_ROWS = 32  # that share a group in the form for CPUs


def read_layer(layer: nn.Module, name: str) -> QuantizedTensor:
    """Return what a layer holds as it is now; nothing is copied that need not be changed.

    Args:
        layer: a Linear4bit or Linear8bitLt.
        name: of the layer, for messages.

    Raises:
        InvalidInput: another module, or a weight that is not quantized or not whole.
    """
    if isinstance(layer, Linear4bit):
        q = read_4bit(layer.weight, state_of(layer), name)
    elif isinstance(layer, Linear8bitLt):
        q = _read_8bit(layer, name)
    else:
        raise InvalidInput(
            f"{name} is a {type(layer).__name__}: expected bitsandbytes' Linear4bit or Linear8bitLt"
        )
    expected = layer.out_features, layer.in_features
    if q.shape != expected:
        raise InvalidInput(
            f"{name} holds a weight {list(q.shape)}, expected {list(expected)}: quantize it anew"
        )
    return q


def state_of(layer: Linear4bit):
    """The QuantState of a layer, or None; the parameter may have lost it (FSDP)."""
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


def read_4bit(weight: Params4bit, state, name: str) -> QuantizedTensor:
    """Return a 4-bit weight and its QuantState as a packed matrix; see ``read_layer``."""
    if state is None or weight.is_meta:
        raise InvalidInput(f"{name} is not quantized yet: move the model to its device first")
    shape = tuple(state.shape)
    plan = plan_of(
        shape, code=state.quant_type, symmetric=True, block_size=state.blocksize, clip=None,
        scale_dtype="float32",
    )  # fmt: skip
    codes = weight.detach().as_subclass(torch.Tensor).view(torch.uint8).reshape(-1)
    if len(codes) != plan.code_bytes:
        raise InvalidInput(
            f"{name} holds {len(codes)} bytes of codes, expected {plan.code_bytes} for "
            f"{list(shape)}: gather a sharded weight first"
        )
    dtype = state.dtype
    if in_cpu_form(state):
        codes, dtype = _from_cpu_form(codes, shape, plan.code), state.original_dtype
    return _packed(shape, dtype, plan, codes, _block_scales(state))


def in_cpu_form(state) -> bool:
    """Whether a layer evaluated on a CPU with AVX-512 bf16 has repacked its weight for it.

    Its scales are then bfloat16, and it multiplies in bfloat16, with the table rounded to it.
    """
    return getattr(state, "packing_format_for_cpu", False)


def values_at(layer: nn.Module, q: QuantizedTensor, positions: torch.Tensor) -> torch.Tensor:
    """What a layer multiplies by at flat positions int64 [k] of its weight, float32 [k]."""
    if q.plan.code.bits == 4:
        pairs = q.codes[positions // 2]
        codes = torch.where(positions % 2 == 0, pairs >> 4, pairs & 15)
    else:
        codes = q.codes[positions]
    scale = q.scales[positions // q.plan.block[1]]
    values = decode(codes, q.plan.code)
    if isinstance(layer, Linear4bit) and in_cpu_form(state_of(layer)):
        return (values.bfloat16() * scale.bfloat16()).float()
    return values * scale


def scales_of(layer: nn.Module) -> torch.Tensor:
    """The tensor that bitsandbytes replaces whenever it quantizes, repacks or moves a weight."""
    if isinstance(layer, Linear4bit):
        return state_of(layer).absmax
    return _int8_of(layer)[1]


def _read_8bit(layer: Linear8bitLt, name: str) -> QuantizedTensor:
    if layer.state.has_fp16_weights:
        raise InvalidInput(
            f"{name} keeps its weight in 16 bits (has_fp16_weights=True): expected an int8 weight"
        )
    codes, largest = _int8_of(layer)
    if codes is None or largest is None or codes.is_meta:
        raise InvalidInput(f"{name} is not quantized yet: move the model to its device first")
    shape = tuple(codes.shape)
    plan = plan_of(
        shape, code="int8", symmetric=True, block_size="row", clip=None, scale_dtype="float32"
    )
    # bitsandbytes has made float16 of the weight before; and this is its own factor of a row.
    scales = largest.view(-1) * (1.0 / 127.0)
    return _packed(shape, torch.float16, plan, codes.view(torch.uint8).reshape(-1), scales)


def _int8_of(layer: Linear8bitLt) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Codes [D, H] and the largest magnitude of each row [D]; the first forward moves them."""
    held = layer.state if layer.state.CB is not None else layer.weight
    return held.CB, held.SCB


def _block_scales(state) -> torch.Tensor:
    if in_cpu_form(state):
        return state.absmax.T.reshape(-1).float()  # from [H / blocksize, D]
    if not state.nested:
        return state.absmax.float()
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def _from_cpu_form(codes: torch.Tensor, shape: tuple[int, int], code: Code) -> torch.Tensor:
    """The packed codes of a matrix [D, H] in the order of its elements.

    A group of 32 bytes holds two columns of 32 rows: the first 16 rows in the low halves of the
    bytes, the others in the high halves, the two columns of a row side by side.
    """
    D, H = shape
    groups = codes.view(-1, _CPU_ROWS)
    halves = torch.stack([groups & 15, groups >> 4], 1)  # [groups, half, 16 rows of 2 columns]
    rows = halves.view(D // _CPU_ROWS, H // 2, _CPU_ROWS, 2).transpose(1, 2)
    return pack(rows.reshape(-1), code)


def _packed(shape, dtype, plan, codes, scales) -> QuantizedTensor:
    positions = torch.empty(0, dtype=torch.int32, device=codes.device)
    values = torch.empty(0, device=codes.device)
    return QuantizedTensor(shape, dtype, plan, codes, scales, None, positions, values)
