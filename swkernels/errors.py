"""Errors that a user can act on: each message is one line, says what came and what to do."""

from __future__ import annotations


class SwkernelsError(Exception):
    """Base of every error that swkernels raises for a wrong input or environment."""

    def __str__(self) -> str:
        # A name in a file can hold anything: a message stays one line and steers no terminal.
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


class BackendUnavailable(SwkernelsError, RuntimeError):
    """The backend that was asked for is unknown, not there, or does not take the arguments."""


class InvalidInput(SwkernelsError, ValueError):
    """An argument, a text, a model or a file is not what the operation takes."""


class NonFiniteActivation(SwkernelsError, ArithmeticError):
    """An activation holds NaN or infinity; the message names the layer, channel and token."""


class RankFailed(SwkernelsError, RuntimeError):
    """Another process of this run has stopped, died or fallen silent; the message says where."""


class SuperWeightChanged(SwkernelsError, RuntimeError):
    """A super weight that training was to leave alone has another value; the message names it."""


class TrainingDiverged(InvalidInput):
    """A loss or a gradient of a training step is NaN or infinite.

    Attributes:
        losses: of the good steps before it, in nats.
    """

    losses: list[float] = []


class NoDenseWeight(SwkernelsError, AttributeError):
    """A library asked a packed layer for the dense weight that it does not have."""
