"""Tensors as bytes and as JSON's types, exactly: what processes send each other."""

from __future__ import annotations

import base64

import torch


def form_of(tensor: torch.Tensor) -> dict:
    """Dtype and shape of a tensor, in JSON's types."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's bytes, row by row: uint8 on the CPU."""
    whole = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return whole.view(-1).view(torch.uint8)


def packed(tensor: torch.Tensor) -> dict:
    """A tensor as JSON's types; see ``unpacked``."""
    data = bytes_of(tensor).numpy().tobytes()
    return form_of(tensor) | {"data": base64.b64encode(data).decode("ascii")}


def unpacked(document: dict) -> torch.Tensor:
    """The tensor that ``packed`` was given, on the CPU."""
    data = bytearray(base64.b64decode(document["data"]))
    dtype = getattr(torch, document["dtype"])
    if not data:
        return torch.empty(document["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(document["shape"])
