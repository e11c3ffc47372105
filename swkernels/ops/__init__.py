"""The operations: one name each, the best backend that is there behind it."""

from swkernels.backends.plan import Clip

from .block_dequantize import block_dequantize
from .block_quantize import block_quantize
from .column_absmax import column_absmax
from .glu_absmax import glu_absmax
from .linear_absmax import linear_absmax
from .lora_linear import lora_linear, lora_linears
from .lora_mask import LoraMask
from .masked_grad import masked_grad_
from .pattern import SparsePattern
from .peaks import INFINITY_KEY, Peaks, empty_keys, peaks, token_index
from .quant_linear import quant_linear
from .quantize_activation import quantize_activation
from .quantized import QuantizedTensor
from .sampled_grad import sampled_grad
from .sparse_linear import pattern_linear, sparse_linear
from .topk import TopK
from .topk_abs import topk_abs
from .topk_low_rank import topk_low_rank

__all__ = [
    "INFINITY_KEY",
    "Clip",
    "LoraMask",
    "Peaks",
    "QuantizedTensor",
    "SparsePattern",
    "TopK",
    "block_dequantize",
    "block_quantize",
    "column_absmax",
    "empty_keys",
    "glu_absmax",
    "linear_absmax",
    "lora_linear",
    "lora_linears",
    "masked_grad_",
    "pattern_linear",
    "peaks",
    "quant_linear",
    "quantize_activation",
    "sampled_grad",
    "sparse_linear",
    "token_index",
    "topk_abs",
    "topk_low_rank",
]
