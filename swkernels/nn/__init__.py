"""Modules that hold weights, trainable or packed, and call the operations."""

from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear, TiedQuantLinear
from .sparse_delta import SparseDelta

__all__ = ["QuantEmbedding", "QuantLinear", "SparseDelta", "TiedQuantLinear"]
