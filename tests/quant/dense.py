"""A dense model with the values that a quantized one has packed."""

from __future__ import annotations

import torch

from swkernels.nn import QuantEmbedding, QuantLinear
from swkernels.nn.quant_experts import QuantExperts


def packed_modules(model) -> dict[str, torch.nn.Module]:
    """Every packed module by name: layers, embeddings, stacks of experts."""
    kinds = (QuantLinear, QuantEmbedding, QuantExperts)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@torch.no_grad()
def unpacked(quantized, dense):
    """Write the values of ``quantized`` into ``dense``, a model of the same architecture."""
    for name, module in packed_modules(quantized).items():
        values = module.dequantize()
        if isinstance(module, QuantExperts):
            owner, _, parameter = name.rpartition(".")
            getattr(dense.get_submodule(owner), parameter).copy_(values)
            continue
        layer = dense.get_submodule(name)
        layer.weight.copy_(values.T if type(layer).__name__ == "Conv1D" else values)
    return dense
