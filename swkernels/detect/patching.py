"""Replace the forward of module instances, and put everything back."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_MARK = "_swkernels_patch"


class Patches:
    """A set of replaced forwards that can be undone exactly, in reverse order.

    Only the instance's ``forward`` attribute changes: classes, hooks, parameters, buffers,
    ``named_modules`` and the state dict stay as they are.
    """

    def __init__(self, name: str):
        self._name = name
        self._undo: list[tuple[nn.Module, Callable, object]] = []

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` carries a patch of this name, by whomever."""
        return getattr(module.__dict__.get("forward"), _MARK, None) == self._name

    def forward(self, module: nn.Module, wrap: Callable[[Callable], Callable]) -> None:
        """Replace ``module.forward`` by ``wrap(module.forward)``."""
        before = module.__dict__.get("forward")
        patched = wrap(module.forward)
        setattr(patched, _MARK, self._name)
        module.forward = patched
        self._undo.append((module, patched, before))

    def undo(self) -> None:
        """Restore every forward; one that somebody else replaced meanwhile is left alone."""
        while self._undo:
            module, patched, before = self._undo.pop()
            if module.__dict__.get("forward") is not patched:
                continue
            if before is None:
                del module.forward
            else:
                module.forward = before
