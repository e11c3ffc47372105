"""Modules that hold trainable weights and call the operations."""

from .sparse_delta import SparseDelta

__all__ = ["SparseDelta"]
