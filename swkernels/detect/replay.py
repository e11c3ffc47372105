"""Run a model again from a block on.

Zeroing a weight of block k leaves everything before block k as it was, so those blocks need not
run again: each returns what block k - 1 returned on the intact model. The model itself does
everything else (embedding, masks, rotary tables, norms, head), so this works for any stack of
blocks that passes one hidden state along, and is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .patching import Patches


class Replay:
    """Records what chosen blocks return and lets the blocks before them stand in for a run.

    Args:
        blocks: the blocks of one stack, in order.
        depths: the blocks from which runs will start; 0 needs no record.
    """

    def __init__(self, blocks: list[nn.Module], depths: Iterable[int]):
        self.blocks = blocks
        self.depths = sorted({depth for depth in depths if depth > 0})
        self._outputs: dict[int, object] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep, during a run of the intact model, the outputs that later runs start from."""
        patches = Patches("record")
        try:
            for depth in self.depths:
                patches.forward(self.blocks[depth - 1], self._recorder(depth))
            yield
        finally:
            patches.undo()

    @contextmanager
    def starting_at(self, depth: int) -> Iterator[None]:
        """Skip the blocks before ``depth`` in every run inside the ``with`` block."""
        patches = Patches("replay")
        try:
            if depth in self._outputs:
                for block in self.blocks[:depth]:
                    patches.forward(block, lambda original: self._player(depth))
            yield
        finally:
            patches.undo()

    def works(self, run: Callable[[], torch.Tensor], expected: torch.Tensor) -> bool:
        """Whether starting at each recorded depth gives the intact model's result, bit for bit.

        A model that passes more than one state from block to block, or that counts on side
        effects of its blocks, fails here and is run in full.
        """
        for depth in self.depths:
            try:
                with self.starting_at(depth):
                    result = run()
            except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
                return False
            if not torch.equal(result, expected):
                return False
        return True

    def _recorder(self, depth: int):
        def wrap(original):
            def forward(*args, **kwargs):
                output = original(*args, **kwargs)
                self._outputs[depth] = output
                return output

            return forward

        return wrap

    def _player(self, depth: int):
        def forward(*args, **kwargs):
            return self._outputs[depth]

        return forward
