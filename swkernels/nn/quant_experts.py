"""Experts whose packed weights stand where their model keeps one parameter for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F

from swkernels.errors import InvalidInput
from swkernels.ops import quant_linear
from swkernels.ops.block_dequantize import check_packed
from swkernels.ops.quantized import QuantizedTensor

from .packed import PackedModule

# How a model keeps the matrices [D, H] of E experts: [E, D, H], [E, H, D], [E * H, D], [E * D, H].
LAYOUTS = ("eoi", "eio", "ei_o", "eo_i")
_PRODUCTS = {
    torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__
}  # fmt: skip
_BATCHED = {torch.bmm, torch.Tensor.bmm, *_PRODUCTS} - {torch.mm, torch.Tensor.mm}


class QuantExpert(PackedModule):
    """The packed matrix [D, H] of one expert."""

    def __init__(self, q: QuantizedTensor):
        super().__init__()
        self.set_packed(q)


class QuantExperts(nn.Module):
    """A packed matrix an expert, in the place of a parameter that holds all of them.

    The forward of the model goes on as it is: where it takes an expert's weight (``weight[e]``) it
    gets an ``ExpertWeight``, and a product with that is ``quant_linear``. So only the experts that
    tokens reach are read, and none is unpacked for good.
    """

    is_expert_stack = True  # see swkernels.models.structure.matrices_of

    @classmethod
    def from_packed(cls, experts: list[QuantizedTensor], layout: str) -> QuantExperts:
        """Hold ``experts`` [D, H].

        Args:
            layout: one of ``LAYOUTS``, that of the parameter.

        Raises:
            InvalidInput: no packed matrix, several shapes, or an unknown layout.
        """
        for q in experts:
            check_packed(q)
        shapes = {tuple(q.shape) for q in experts}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise InvalidInput(f"experts must be packed matrices of one shape, got {shapes}")
        if layout not in LAYOUTS:
            raise InvalidInput(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        module = cls()
        module.layout = layout
        for number, q in enumerate(experts):
            module.add_module(str(number), QuantExpert(q))
        return module

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[QuantExpert]:
        return iter(self._modules.values())

    def expert(self, index: int) -> QuantExpert:
        """The module that holds one expert's matrix [D, H]."""
        return self._modules[str(index)]

    @property
    def shape(self) -> torch.Size:
        """The shape that the parameter would have."""
        E, (D, H) = len(self), self.expert(0).packed.shape
        shapes = {"eoi": (E, D, H), "eio": (E, H, D), "ei_o": (E * H, D), "eo_i": (E * D, H)}
        return torch.Size(shapes[self.layout])

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights that were packed."""
        return self.expert(0).packed.dtype

    @property
    def device(self) -> torch.device:
        return self.expert(0).packed.device

    @property
    def transposed(self) -> bool:
        """Whether an expert's weight is [H, D] to the model."""
        return self.layout in ("eio", "ei_o")

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape) -> QuantExperts:
        """Rows of all experts seen as [E, ., .]; there is no other way to see them.

        Raises:
            InvalidInput: another shape.
        """
        sizes = tuple(shape[0]) if isinstance(shape[0], (tuple, list)) else shape
        D, H = self.expert(0).packed.shape
        expected = (len(self), *((H, D) if self.transposed else (D, H)))
        if len(sizes) != 3 or any(s not in (-1, e) for s, e in zip(sizes, expected)):
            raise InvalidInput(f"packed experts can be seen as {list(expected)}, got {list(sizes)}")
        return self

    def __getitem__(self, index: int | torch.Tensor) -> ExpertWeight | torch.Tensor:
        """The weight of one expert; of several, given by a list of indices, unpacked."""
        if isinstance(index, torch.Tensor) and index.dim():
            return torch.stack([self[int(e)].dequantize() for e in index])
        return ExpertWeight(self, int(index) % len(self))

    def dequantize(self) -> torch.Tensor:
        """All of it as a tensor of ``shape``."""
        weights = [self[e].dequantize() for e in range(len(self))]
        return torch.stack(weights).view(self.shape)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _BATCHED and len(args) == 2 and isinstance(args[1], cls):
            x, stack = args
            if x.dim() == stack.dim() == 3:  # every expert has its rows (Llama 4)
                return torch.stack([x[e] @ stack[e] for e in range(len(stack))])
        return _unpacked(func, args, kwargs)

    def extra_repr(self) -> str:
        return f"{len(self)} experts, {list(self.shape)}, {self.layout}"

    def __repr__(self) -> str:  # not a line for every expert
        return f"{type(self).__name__}({self.extra_repr()})"


def replace_parameter(module: nn.Module, name: str, stack: QuantExperts) -> None:
    """Put ``stack`` in the place of a parameter, and let the module take one expert at a time."""
    delattr(module, name)
    module.add_module(name, stack)
    forward = type(module).forward
    if forward.__globals__["__name__"] == "transformers.integrations.moe":
        # Of its ways to multiply the written-out one alone takes an expert's weight by itself.
        module.forward = MethodType(forward.__wrapped__, module)


class ExpertWeight:
    """What a model takes for the weight of an expert: a matrix that is packed.

    A product of activations with it is ``quant_linear``; any other torch function gets the values.

    Attributes:
        stack, expert: which of which experts.
        transposed: whether it is [H, D], as its layer multiplies without a transpose.
    """

    def __init__(self, stack: QuantExperts, expert: int, transposed: bool | None = None):
        self.stack = stack
        self.expert = expert
        self.transposed = stack.transposed if transposed is None else transposed

    @property
    def packed(self) -> QuantizedTensor:
        """The matrix [D, H]."""
        return self.stack.expert(self.expert).packed

    @property
    def shape(self) -> torch.Size:
        D, H = self.packed.shape
        return torch.Size((H, D) if self.transposed else (D, H))

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dim(self) -> int:
        return 2

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    @property
    def T(self) -> ExpertWeight:
        return ExpertWeight(self.stack, self.expert, not self.transposed)

    mT = T

    def t(self) -> ExpertWeight:
        return self.T

    def transpose(self, first: int, second: int) -> ExpertWeight:
        return self if first % 2 == second % 2 else self.T

    def dequantize(self) -> torch.Tensor:
        """The values, in the type of the weight that was packed."""
        matrix = self.packed.dequantize()
        return matrix.T if self.transposed else matrix

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if len(args) > 1 and isinstance(args[0], torch.Tensor) and isinstance(args[1], cls):
            x, weight = args[:2]
            if func is F.linear and not weight.transposed:
                return quant_linear(x, weight.packed, *args[2:], **kwargs or {})
            if func in _PRODUCTS and weight.transposed and len(args) == 2:
                return quant_linear(x, weight.packed)
        return _unpacked(func, args, kwargs)


def _unpacked(func, args, kwargs):
    """Call a torch function that knows nothing of packed weights."""

    def plain(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(plain, value))
        return value.dequantize() if isinstance(value, (QuantExperts, ExpertWeight)) else value

    return func(*map(plain, args), **{key: plain(value) for key, value in (kwargs or {}).items()})
