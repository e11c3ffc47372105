"""A case: one operation on one shape and dtype, its providers, and how a result is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from benchmarks.expected import Work
from swkernels import backends, ops

Tensors = Mapping[str, torch.Tensor]
Call = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    Attributes:
        name: as it stands in the records.
        role: "ours", "bare" (without our extra work), "eager", "compile" or "peer".
        call: from inputs to named outputs; what it leaves out is not judged.
        missing: why it cannot run here, or None.
        note: what served the automatic choice, or None.
        weights: tells the bytes of the model's weights, after the first call; None where it has
            no model.
        step_memory: tells the bytes that a training step takes beyond the loaded model; None where
            it trains nothing.
    """

    name: str
    role: str
    call: Call
    missing: str | None = None
    note: str | None = None
    weights: Callable[[], int] | None = None
    step_memory: Callable[[], int | None] | None = None


@dataclass(frozen=True)
class Error:
    """How far a result is from float64, and how far it may be."""

    value: float
    limit: float
    measure: str

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # NaN does not pass


@dataclass(frozen=True)
class Case:
    """What is measured, and against what.

    Attributes:
        op, models, projection, shape, dtype: as in the records.
        work: the least that must be done, from `benchmarks.expected`.
        slowest: floors that the slowest provider takes, roughly: what is too long is left out.
        seconds: of timing, over all providers.
        cold: the inputs that the provider which reads least reads, where that is not all of them;
            the cache must be cold for it too.
        make: inputs from a seed, on the device.
        judge: from inputs to a function that tells the error of named outputs.
        providers: made when the case is measured, since some compile.
    """

    op: str
    models: tuple[str, ...]
    projection: str
    shape: Mapping[str, int]
    dtype: str
    work: tuple[Work, ...]
    slowest: float
    make: Callable[[int], Tensors] = field(repr=False)
    judge: Callable[[Tensors], Callable[[Tensors], Error]] = field(repr=False)
    providers: Callable[[], list[Provider]] = field(repr=False)
    seconds: float = 1.0
    cold: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """A name that no other case of the operation has."""
        tokens = f", {self.shape['tokens']} tokens" if "tokens" in self.shape else ""
        return f"{self.models[0]} {self.projection}{tokens}, {self.dtype}"


def ours(
    op: str, call: Callable[..., Tensors], device: torch.device, *, interpreted: bool
) -> list[Provider]:
    """The automatic choice, and every other kernel that can serve ``op`` on ``device``.

    The reference is left out where a kernel serves: it is the definition and not made for speed.
    ``call`` takes the inputs and ``backend=``. Under the interpreter Triton is asked for by name.
    """
    if interpreted:
        return [Provider("swkernels", "ours", _bound(call, "triton"), note="backend triton")]
    (row,) = (row for row in backends.explain(device.type) if row["op"] == op)
    chosen = row["backend"]
    found = [Provider("swkernels", "ours", _bound(call, None), note=f"backend {chosen}")]
    for name, reason in row["others"].items():
        if name == "reference" or not reason.startswith("usable"):
            continue
        found.append(Provider(f"swkernels ({name})", "ours", _bound(call, name)))
    return found


def _bound(call: Callable[..., Tensors], backend: str | None) -> Call:
    return lambda inputs: call(inputs, backend=backend)


def compiled(
    make: Callable[[], Callable], *, dry: bool, around: Callable[[Callable], Call] | None = None
) -> Provider:
    """``torch.compile`` of what eager PyTorch does, which ``make`` returns, with its defaults.

    So the second shape makes the sizes dynamic, and few builds serve all cases. ``around`` makes
    the call where only a part of it is compiled.
    """
    missing = "left out of a dry run: it compiles for long" if dry else None
    call = lazily(lambda: (around or (lambda part: part))(torch.compile(make())))
    return Provider("torch.compile", "compile", call, missing)


def lazily(make: Callable[[], Call]) -> Call:
    """A call that is made when it is first needed: making it may take memory or time."""
    made: list[Call] = []

    def call(inputs):
        if not made:
            made.append(make())
        return made[0](inputs)

    return call


def peer(
    name: str,
    package: str,
    device: torch.device,
    call: Call,
    *,
    devices: tuple[str, ...] = ("cuda",),
    refusal: str | None = None,
    weights: Callable[[], int] | None = None,
) -> Provider:
    """Another package's kernel, where it is installed, runs on the device and takes the case.

    ``refusal`` says why it does not take the case; ``weights`` is that of ``Provider``.
    """
    missing = refusal
    if find_spec(package) is None:
        missing = f"{package} is not installed"
    elif device.type not in devices:
        missing = f"{package} runs on CUDA only"
    return Provider(name, "peer", call, missing, weights=weights)


def normal(seed: int, *shape: int, dtype: str, device: torch.device, scale: float = 1.0):
    """Random numbers that depend on the seed and the shape only on one kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(*shape, generator=generator, device=device)
    return values.mul_(scale).to(getattr(torch, dtype))


def wrong_channels(keys: torch.Tensor, values: torch.Tensor) -> int:
    """Channels of ``keys`` [C] that are not exactly the peaks of ``values`` [T, C]."""
    expected = ops.column_absmax(values, backend="reference")
    return int((keys != expected).sum())


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """||ours - exact|| / ||exact|| in float64, by blocks of rows."""
    difference = norm = 0.0
    for start in range(0, len(exact), 1024):
        part = exact[start : start + 1024].double()
        difference += float((ours[start : start + 1024].double() - part).square().sum())
        norm += float(part.square().sum())
    return (difference / norm) ** 0.5 if norm else difference**0.5
