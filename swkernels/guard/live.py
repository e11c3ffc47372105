"""Check a model in memory against the manifest of the checkpoint that it was loaded from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models.checkpoint import DTYPES

from .digests import digest_chunks
from .findings import Finding, Hit
from .live_names import Match, match
from .manifest import Manifest, SuperWeight, Tensor
from .reading import Progress, silent
from .verify import chunk_of, damaged_chunks, describe

_PIECE = 64 << 20  # bytes that are moved from a device at a time


@dataclass(frozen=True)
class LiveCheck:
    """What a check of a model found.

    Attributes:
        manifest: the SHA-256 of the manifest's content.
        fast: whether the super weights alone were looked at.
        findings: tensors that changed, with their chunks and the super weights that were hit.
        not_compared: (tensor of the manifest, why) of those that nothing can be said of.
        tensors, bytes: how many were compared, and how large they are; of a fast check, 0.
        super_weights: how many were compared.
    """

    manifest: str
    fast: bool
    findings: tuple[Finding, ...]
    not_compared: tuple[tuple[str, str], ...]
    tensors: int
    bytes: int
    super_weights: int
    schema: str = field(default="swkernels.live_check/1", init=False)

    @property
    def ok(self) -> bool:
        """Whether everything was compared and nothing changed."""
        return not self.findings and not self.not_compared

    @property
    def hits(self) -> list[Hit]:
        """The super weights that are not what they were."""
        return [hit for finding in self.findings for hit in finding.super_weights]

    def __str__(self) -> str:
        if self.fast:
            said = [f"{len(self.hits)} of {self.super_weights} super weights changed"]
        else:
            changed = len({finding.name for finding in self.findings})
            said = [
                f"{changed} of {self.tensors} tensors changed",
                f"{len(self.hits)} of {self.super_weights} super weights hit",
            ]
        if self.not_compared:
            name, why = self.not_compared[0]
            said.append(f"{len(self.not_compared)} tensors not compared ({name}: {why})")
        return ", ".join(said)

    def to_dict(self) -> dict:
        """The whole result as plain values, with ``schema`` first."""
        return {
            "schema": self.schema,
            "manifest": self.manifest,
            "fast": self.fast,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "super_weights": self.super_weights,
            "findings": [finding.to_dict() for finding in self.findings],
            "not_compared": [{"tensor": name, "why": why} for name, why in self.not_compared],
        }


def check(
    model: nn.Module, manifest: Manifest, *, fast: bool = False, progress: Progress = silent
) -> LiveCheck:
    """Say whether the weights of a model in memory are those of its checkpoint, and where not.

    Every tensor is hashed as it is in the checkpoint's files, on the CPU: from a GPU it is moved
    piece by piece. Names and fused experts are traced back as far as that is known; what cannot be
    compared is listed with the reason and is never counted as intact.

    Args:
        model: in the dtype of the checkpoint; adapters and ``torch.compile`` are looked through.
        manifest: from ``create`` or ``Manifest.load``.
        fast: look at the super weights alone, a few numbers. The model may then also be of a wider
            floating-point type, such as float32 for a bfloat16 checkpoint.
        progress: called with (stage, bytes done, bytes in all).

    Raises:
        InvalidInput: nothing can be compared: another dtype, quantized, another model; or a fast
            check of a manifest without super weights.
    """
    if fast and not manifest.super_weights:
        raise InvalidInput(
            "the manifest has no super weights for a fast check: give create() a scan's report, "
            "or check all tensors"
        )
    wanted = manifest.by_name
    if fast:
        wanted = {weight.tensor: wanted[weight.tensor] for weight in manifest.super_weights}
    matches = match(model, wanted)
    reasons = {name: _why_not(wanted[name], found, fast) for name, found in matches.items()}
    not_compared = tuple((name, why) for name, why in reasons.items() if why)
    compared = {name: matches[name].value for name in wanted if not reasons[name]}
    if wanted and not compared:
        name, why = not_compared[0]
        raise InvalidInput(f"this model cannot be compared with the manifest: {name}: {why}")
    hits = {name: [] for name in compared}
    weights = [weight for weight in manifest.super_weights if weight.tensor in compared]
    for weight in weights:
        hit = _hit(weight, compared[weight.tensor], wanted[weight.tensor].dtype)
        if hit is not None:
            hits[weight.tensor].append(hit)
    findings = []
    sizes = {name: 0 if fast else wanted[name].size for name in compared}
    done, total = 0, sum(sizes.values())
    for name, value in compared.items():
        if fast:
            if hits[name]:
                findings.append(_of_hits(name, hits[name]))
        else:
            findings += _damage(manifest, wanted[name], value, hits[name])
        done += sizes[name]
        progress("comparing", done, total)
    return LiveCheck(
        manifest=manifest.sha256,
        fast=fast,
        findings=tuple(findings),
        not_compared=not_compared,
        tensors=0 if fast else len(compared),
        bytes=total,
        super_weights=len(weights),
    )


def _why_not(tensor: Tensor, found: Match, fast: bool) -> str:
    """Why a tensor cannot be compared; empty where it can."""
    if found.value is None:
        return found.reason
    if found.value.is_meta:
        return f"{found.name} is on the meta device (offloaded): load the model into memory"
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        return f"{tensor.dtype} holds no single values: verify the files instead"
    if found.value.dtype == dtype or (fast and _holds(found.value.dtype, dtype)):
        return ""
    return (
        f"{found.name} is {found.value.dtype}, the checkpoint has {dtype}: load the model with "
        "dtype='auto'"
    )


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of a floating-point type has one in another."""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.smallest_normal * a.eps <= (
        b.smallest_normal * b.eps
    )  # fmt: skip


def _hit(weight: SuperWeight, value: torch.Tensor, dtype: str) -> Hit | None:
    """What stands in the place of a super weight, if that is something else."""
    place = torch.unravel_index(torch.tensor(weight.element), value.shape)
    found = value[tuple(int(index) for index in place)].cpu().reshape(1)
    expected = torch.frombuffer(bytearray.fromhex(weight.bits), dtype=DTYPES[dtype])
    if torch.equal(_bytes(found), _bytes(expected.to(found.dtype))):
        return None
    return Hit(weight, bytes(_bytes(found).tolist()).hex(), found.item())


def _of_hits(name: str, hits: list[Hit]) -> Finding:
    count = len(hits)
    detail = f"{count} super weight{'s' * (count > 1)}"
    return Finding("changed tensor", name, detail, super_weights=tuple(hits))


def _damage(
    manifest: Manifest, tensor: Tensor, value: torch.Tensor, hits: list[Hit]
) -> list[Finding]:
    """The damaged chunks of a tensor, each run of neighbours a finding."""
    data = _bytes(value)  # [size]
    step = max(1, _PIECE // manifest.chunk) * manifest.chunk
    found = b"".join(
        digest_chunks(data[at : at + step].cpu().numpy(), manifest.chunk, manifest.hash)
        for at in range(0, len(data), step)
    )
    findings: list[Finding] = []
    first = last = None
    for number in [*damaged_chunks(tensor.chunks, found, tensor.size, manifest), None]:
        if first is not None and number != last + 1:
            inside = [h for h in hits if first <= chunk_of(manifest, h.weight) <= last]
            findings.append(describe(manifest, tensor, (first, last), inside))
            first = None
        if first is None:
            first = number
        last = number
    return findings


def _bytes(value: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as a file has them: uint8, row by row."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)
