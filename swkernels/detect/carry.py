"""How far a forward has come: what is needed to start it again between two blocks.

Started so, the blocks before do not run and return what they returned; the model computes the rest
(masks, positions, what stands between the blocks) again. Whether that is all there is to it, is
seen at the block where the forward goes on: what goes into it must be the same, by hash.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from swkernels.errors import SwkernelsError
from swkernels.models.stepping import Call, tensors_in


class CannotGoOn(SwkernelsError):
    """A model's blocks pass more to each other than their outputs."""


@dataclass
class Carry:
    """The outputs of the last blocks that a forward has passed, one a list of blocks.

    Attributes:
        outputs: by name of the block; a tensor, or a tuple of tensors and None.
        digest: of what goes into the next block, see ``digest_of``.
    """

    outputs: dict[str, object] = field(default_factory=dict)
    digest: str | None = None

    def note(self, block: str, output) -> None:
        """Say that ``block`` was passed."""
        for other in [name for name in self.outputs if _list_of(name) == _list_of(block)]:
            del self.outputs[other]
        self.outputs[block] = output

    def played(self, parts: list[str]) -> dict[str, object]:
        """What blocks return that do not run again; ``parts`` are all, in their order."""
        found: dict[str, object] = {}
        for last, output in self.outputs.items():
            before = parts[: parts.index(last) + 1]
            found |= {p: output for p in before if _list_of(p) == _list_of(last)}
        return found

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of it, in a fixed order."""
        return [t for output in self.outputs.values() for t in tensors_in(output)]

    def to_dict(self) -> dict:
        """Everything but the tensors' values."""
        kinds = {name: _kinds(output) for name, output in self.outputs.items()}
        return {"outputs": kinds, "digest": self.digest}

    @classmethod
    def from_dict(cls, document: dict, tensors: list[torch.Tensor]) -> Carry:
        """Put together what ``to_dict`` and ``tensors`` took apart."""
        rest = iter(tensors)
        outputs: dict[str, object] = {}
        for name, kinds in document["outputs"].items():
            values = tuple(next(rest) if kind else None for kind in kinds["entries"])
            outputs[name] = values if kinds["tuple"] else values[0]
        return cls(outputs, document["digest"])

    def check(self, call: Call) -> None:
        """Raise CannotGoOn unless ``call`` is how the next block was called before."""
        if digest_of(call) != self.digest:
            raise CannotGoOn(
                f"{call.part} is called with other values than before: this model's blocks pass "
                "more to each other than their outputs"
            )


def digest_of(call: Call) -> str:
    """A sha256 of the part and of every tensor that goes into it."""
    total = hashlib.sha256(call.part.encode())
    for tensor in tensors_in((call.args, call.kwargs)):
        total.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        # A copy: NumPy would keep the memory of the tensor itself from being given back.
        data = real.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()
        total.update(memoryview(data.view(torch.uint8).numpy()))
    return total.hexdigest()


def _kinds(output) -> dict:
    entries = output if isinstance(output, tuple) else (output,)
    if not all(entry is None or isinstance(entry, torch.Tensor) for entry in entries):
        raise CannotGoOn(f"a block returns {type(output).__name__}: expected tensors")
    return {"tuple": isinstance(output, tuple), "entries": [e is not None for e in entries]}


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]
