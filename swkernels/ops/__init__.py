"""The operations: one name each, the best backend that is there behind it."""

from .column_absmax import column_absmax
from .glu_absmax import glu_absmax
from .linear_absmax import linear_absmax
from .peaks import INFINITY_KEY, Peaks, empty_keys, peaks, token_index

__all__ = [
    "INFINITY_KEY",
    "Peaks",
    "column_absmax",
    "empty_keys",
    "glu_absmax",
    "linear_absmax",
    "peaks",
    "token_index",
]
