"""The backends and the choice among them.

One explicit choice (the ``backend=`` argument, ``with use_backend(...)``, or the environment
variable ``SWKERNELS_BACKEND``, in this order) must succeed or raise, naming what is missing. The
automatic choice walks the list of the tensor's device and takes the first backend that is there
and takes the arguments.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch

from swkernels.errors import BackendUnavailable

from .plan import Code, Plan

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPERATIONS = (
    "column_absmax",
    "linear_absmax",
    "glu_absmax",
    "sampled_grad",
    "sparse_linear",
    "masked_grad",
    "lora_linear",
    "topk_low_rank",
    "topk_abs",
    "block_quantize",
    "block_dequantize",
    "quant_linear",
)

# Which backend serves a device first. `cuda` (CUDA C++) stands behind Triton until a record made
# on a GPU shows where it is faster.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_OTHER_DEVICES = ("reference",)

_chosen: ContextVar[str | None] = ContextVar("swkernels_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make ``name`` the explicit choice for every operation inside the ``with`` block."""
    _check_name(name, "use_backend()")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def explicit_choice(backend: str | None = None) -> str | None:
    """Return the backend that the caller, the context or the environment asks for, or None."""
    if backend is not None:
        return _check_name(backend, "backend=")
    if _chosen.get() is not None:
        return _chosen.get()
    name = os.environ.get("SWKERNELS_BACKEND")
    return _check_name(name, "SWKERNELS_BACKEND") if name else None


def select(op: str, *args, backend: str | None = None) -> Callable:
    """Return the function that computes ``op`` for ``args`` (those that ``supports`` takes).

    Raises:
        BackendUnavailable: the explicit choice is not there or does not take the arguments.
    """
    return getattr(serving(op, *args, backend=backend), op)


def serving(op: str, *args, backend: str | None = None) -> ModuleType:
    """Return the module that serves ``op``, for an operation of several steps; see ``select``."""
    explicit = explicit_choice(backend)
    if explicit is not None:
        reason = _refusal(explicit, op, args)
        if reason is not None:
            raise BackendUnavailable(f"backend {explicit!r} cannot run {op}: {reason}")
        return _module(explicit, op)
    for name in _ORDER.get(args[0].device.type, _OTHER_DEVICES):
        if _refusal(name, op, args) is None:
            return _module(name, op)
    raise AssertionError("the reference backend takes everything")


def explain(device: str = "cpu") -> list[dict]:
    """Say for each operation which backend serves plain float32 tensors on ``device``, and why.

    Returns a list of {"op", "device", "backend", "reason", "others": {backend: reason}}.
    """
    order = _ORDER.get(torch.device(device).type, _OTHER_DEVICES)
    explicit = explicit_choice()
    rows = []
    for op in OPERATIONS:
        refusals = {name: _refusal(name, op, _probe(op, device)) for name in BACKENDS}
        others = {
            name: reason or f"usable, but not the automatic choice on {device}"
            for name, reason in refusals.items()
        }
        if explicit is not None:
            chosen, reason = explicit, f"explicit choice; {refusals[explicit] or 'it can run'}"
        else:
            chosen = next(name for name in order if refusals[name] is None)
            reason = f"first usable of {', '.join(order)}"
        others.pop(chosen)
        rows.append(
            {"op": op, "device": device, "backend": chosen, "reason": reason, "others": others}
        )
    return rows


def _probe(op: str, device: str) -> tuple:
    x = torch.zeros(1, 16, device=device)
    plan = Plan(1, 16, (0, 16), Code("int4"))
    return {
        "column_absmax": (x,),
        "linear_absmax": (x, torch.zeros(16, 16, device=device), None),
        "glu_absmax": (x, x, "silu"),
        "sampled_grad": (x, x),
        "sparse_linear": (x, x),
        "masked_grad": (x,),
        "lora_linear": (x,),
        "topk_low_rank": (x, x),
        "topk_abs": (x,),
        "block_quantize": (x, plan),
        "block_dequantize": (x.to(torch.uint8), plan, torch.float32),
        "quant_linear": (x, plan),
    }[op]


def _check_name(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise BackendUnavailable(
            f"unknown backend {name!r} in {where}: expected one of {', '.join(BACKENDS)}"
        )
    return name


def _refusal(name: str, op: str, args: tuple) -> str | None:
    """Return why backend ``name`` cannot run ``op`` on ``args``, or None if it can."""
    reason = _package(name).available()
    if reason is not None:
        return reason
    module = _module(name, op)
    if module is None:
        return f"it has no {op}"
    return module.supports(*args)


@cache
def _package(name: str):
    return importlib.import_module(f"swkernels.backends.{name}")


@cache
def _module(name: str, op: str):
    path = f"swkernels.backends.{name}.{op}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        return None
