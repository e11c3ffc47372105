"""A linear layer over a packed weight."""

from __future__ import annotations

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.ops.block_dequantize import check_packed
from swkernels.ops.quant_linear import quant_linear
from swkernels.ops.quantized import QuantizedTensor

from .packed import PackedModule, empty_packed


class QuantLinear(PackedModule, nn.Linear):
    """y = x W^T + b of a packed weight W [D, H]; differentiable in x.

    It is an ``nn.Linear`` for what looks for one (adapters, ``isinstance``), without the weight.

    Attributes:
        in_features, out_features: H and D.
        bias: [D], frozen, or None.
    """

    def __init__(self, packed: QuantizedTensor, bias: torch.Tensor | None = None):
        nn.Module.__init__(self)  # nn.Linear's would make a weight
        check_packed(packed)
        if len(packed.shape) != 2:
            raise InvalidInput(f"a packed weight must be [D, H], got {list(packed.shape)}")
        self.out_features, self.in_features = packed.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise InvalidInput(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        if bias is not None:
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.set_packed(packed)

    @classmethod
    def from_packed(cls, q: QuantizedTensor, bias: torch.Tensor | None = None) -> QuantLinear:
        """A layer over a packed weight [D, H], whose memory it shares.

        Args:
            q: of ``ops.block_quantize``.
            bias: [D], floating-point, or None.

        Raises:
            InvalidInput: ``q`` is no packed matrix, or a shape that does not fit.
        """
        return cls(q, bias)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, *, dtype: torch.dtype, bias: bool = False, **form
    ) -> QuantLinear:
        """A layer without values, to load some into.

        Args:
            dtype: of the weight that was quantized, and of the bias.
            form: of ``packed.empty_packed``: outliers, code, block_size, device ("meta") ...
        """
        q = empty_packed((out_features, in_features), dtype=dtype, **form)
        b = torch.empty(out_features, dtype=dtype, device=q.device) if bias else None
        return cls(q, b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., D] in x's type; under autocast in that of autocast."""
        return quant_linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.form_repr()}"


class TiedQuantLinear(nn.Module):
    """The head of a model whose packed embedding [V, H] is its weight too: y = x W^T + b.

    It holds no buffers. The embedding is moved, saved and loaded as the module that it is, once.
    """

    def __init__(self, embedding: PackedModule, bias: nn.Parameter | None = None):
        super().__init__()
        self._embedding = [embedding]  # in a list it is no child
        self.out_features, self.in_features = embedding.packed.shape
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> PackedModule:
        """The embedding whose matrix it shares."""
        return self._embedding[0]

    @property
    def packed(self) -> QuantizedTensor:
        """The packed matrix of the embedding."""
        return self.embedding.packed

    forward = QuantLinear.forward
