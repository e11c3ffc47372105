"""A packed matrix: codes, scales, and what is kept exactly beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from swkernels.backends.plan import Plan

OUTLIER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS_PER_OUTLIER = 16  # at least: more take the space of the 4-bit codes themselves
SCALE_BLOCK = 256  # scales that are quantized themselves share a scale by so many


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A packed matrix, and the elements that are kept exactly.

    The value of an element is its outlier value where its position is listed, else
    table[code] * scale, or (code - zero) * scale where codes are integers, in float32, with the
    code's own zero or the block's zero point; rounded once to the type that is asked for.

    Attributes:
        shape: of the tensor; its rows are all dimensions but the last.
        dtype: of the tensor that was quantized.
        plan: how it is cut and coded.
        codes: uint8 [plan.code_bytes], in the order of the flattened matrix; of two 4-bit codes
            in a byte the first has the high half.
        scales: [plan.blocks] float32 or float16; or a QuantizedTensor of them (scale_dtype int8).
        zero_points: int32 or int16 [plan.blocks]; None for a symmetric code.
        positions: int32 [k], ascending: row * columns + column of the outliers.
        values: [k] float32, bfloat16 or float16: their exact values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    plan: Plan
    codes: torch.Tensor
    scales: torch.Tensor | QuantizedTensor
    zero_points: torch.Tensor | None
    positions: torch.Tensor
    values: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def block_scales(self) -> torch.Tensor:
        """The scales [plan.blocks] in float32 or float16, unpacked where they are quantized."""
        if isinstance(self.scales, QuantizedTensor):
            from .block_dequantize import block_dequantize

            return block_dequantize(self.scales).view(-1)
        return self.scales

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that it holds, by name; ``with_tensors`` takes them back."""
        held = {"codes": self.codes}
        if isinstance(self.scales, QuantizedTensor):
            held |= {f"scales_{name}": t for name, t in self.scales.tensors().items()}
        else:
            held["scales"] = self.scales
        if self.zero_points is not None:
            held["zero_points"] = self.zero_points
        return held | {"positions": self.positions, "values": self.values}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> QuantizedTensor:
        """The same matrix with other tensors under the names of ``tensors()``."""
        scales = self.scales
        if isinstance(scales, QuantizedTensor):
            prefix = "scales_"
            inner = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
            scales = scales.with_tensors(inner)
        else:
            scales = tensors["scales"]
        return replace(
            self,
            codes=tensors["codes"],
            scales=scales,
            zero_points=tensors.get("zero_points"),
            positions=tensors["positions"],
            values=tensors["values"],
        )

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same matrix on another device."""
        return self.with_tensors({name: t.to(device) for name, t in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The matrix in ``dtype``, its own by default; see ``block_dequantize``."""
        from .block_dequantize import block_dequantize

        return block_dequantize(self, dtype)
