"""Train exactly k weights of a model: plain PyTorch, any trainer, any optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.files import write_atomically
from swkernels.nn import SparseDelta

from .coordinates import Coordinates, Site
from .experts import CHILD
from .fingerprint import fingerprint
from .merging import Merged, check_merge, merge
from .sites import Target, find_targets

_FORMAT = "swkernels.sparse/1"


def sparse(model: nn.Module, coordinates: Coordinates, *, name: str = "default") -> SparseHandle:
    """Freeze ``model`` and make only ``coordinates`` of its weights trainable.

    Beside each weight that is named lies a float32 vector of deltas, zero at first; the layer's
    output gets their contribution, and their gradient is computed at the coordinates only: no
    tensor of the weight's size is formed. ``model.parameters()`` then has k trainable values, and
    everything that trains a model works on it unchanged.

    Args:
        model: any model. The layers may be quantized (bitsandbytes), sharded or compiled.
        coordinates: which weights; see ``swkernels.train.Coordinates``.
        name: of this adapter. A model can carry several; all that are active contribute.

    Returns:
        A handle: the values, merge, disable, save, load, remove.

    Raises:
        InvalidInput: a module or expert that is not there, another shape, a name that is taken;
            the model is as it was.
    """
    targets = find_targets(model, coordinates)
    for target in targets.values():
        delta = target.delta
        if delta is not None and name in delta.values:
            raise InvalidInput(f"the model has an adapter {name!r} already: choose another name")
    frozen = [p for p in model.parameters() if p.requires_grad and not _is_value(model, p)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for site, target in targets.items():
        target.adapt().add_adapter(name, coordinates.weights[site])
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.enable_input_require_grads()  # a reentrant checkpoint needs an input with gradient
    return SparseHandle(model, coordinates, name, targets, frozen)


class SparseHandle:
    """What ``sparse`` returns: the trainable values and what can be done with them.

    Attributes:
        model: the adapted model.
        coordinates: those that are trained.
        name: of the adapter.
    """

    def __init__(self, model, coordinates, name, targets: dict[Site, Target], frozen):
        self.coordinates = coordinates
        self.name = name
        self.model = model
        self._targets = targets
        self._frozen = frozen
        self._merged: dict[Site, Merged] = {}

    def values(self) -> dict[Site, nn.Parameter]:
        """The deltas of each weight, float32 [k], in the order of ``coordinates.weights``."""
        return {site: target.delta.values[self.name] for site, target in self._targets.items()}

    def parameters(self) -> list[nn.Parameter]:
        """The trainable values, for an optimizer."""
        return list(self.values().values())

    def identity(self) -> dict[str, str]:
        """Digests of the coordinates and of the base weights there, 16 hexadecimal digits each."""
        listed, base = hashlib.sha256(), hashlib.sha256()
        for site, pairs in self.coordinates.weights.items():
            listed.update(str(site).encode() + pairs.numpy().tobytes())
            base.update(str(fingerprint(self.target(site), pairs)).encode())
        return {"coordinates": listed.hexdigest()[:16], "base": base.hexdigest()[:16]}

    def target(self, site: Site) -> Target:
        """The weight of a site, as ``sparse`` found it."""
        return self._targets[site]

    def owns(self, name: str) -> bool:
        """Whether a key of the model's state dict is a delta's, not the base's."""
        return any(part.startswith(CHILD) for part in name.split("."))

    @property
    def merged(self) -> bool:
        """Whether the deltas are in the weights now."""
        return bool(self._merged)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside the ``with`` block the model computes without this adapter."""
        deltas = [target.delta for target in self._targets.values()]
        before = [list(delta.active) for delta in deltas]
        for delta in deltas:
            delta.active = [name for name in delta.active if name != self.name]
        try:
            yield
        finally:
            for delta, active in zip(deltas, before):
                delta.active = active

    def merge(self) -> None:
        """Write weight + delta into the weights themselves; the layers then cost nothing extra.

        A weight that ``swkernels.quantize`` has packed keeps the sum as an outlier, in float32.

        Raises:
            InvalidInput: merged already, or a weight that is packed by others, sharded or on the
                meta device and cannot be written; nothing has been changed.
        """
        if self._merged:
            raise InvalidInput("the adapter is merged already: call unmerge() first")
        pairs = {site: t.delta.coordinates(self.name) for site, t in self._targets.items()}
        for site, target in self._targets.items():
            check_merge(target, pairs[site])
        for site, target in self._targets.items():
            delta = target.delta
            self._merged[site] = merge(target, pairs[site], delta.values[self.name].detach())
            delta.active = [name for name in delta.active if name != self.name]

    def unmerge(self) -> None:
        """Put the weights back exactly as they were before ``merge``."""
        if not self._merged:
            raise InvalidInput("the adapter is not merged: there is nothing to undo")
        for site, merged in self._merged.items():
            merged.undo()
            self._targets[site].delta.active.append(self.name)
        self._merged.clear()

    def remove(self) -> None:
        """Take the adapter off the model; a merged one stays in the weights.

        What ``sparse`` froze requires gradients again.
        """
        for target in self._targets.values():
            target.release(self.name)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._targets = {}

    def save(self, path: str | Path) -> None:
        """Write coordinates, values and a fingerprint of the base to a safetensors file.

        The file is written aside and renamed.

        Raises:
            InvalidInput: the folder is not there or cannot be written.
        """
        from safetensors.torch import save

        tensors, metadata = {}, {"format": _FORMAT}
        for number, (site, values) in enumerate(self.values().items()):
            tensors[f"{number}.values"] = whole(values.detach()).float().cpu().contiguous()
            tensors[f"{number}.coordinates"] = self.coordinates.weights[site].cpu().contiguous()
            expert = "" if site.expert is None else str(site.expert)
            shape = "x".join(map(str, self.coordinates.shapes[site]))
            base = self._fingerprint(site, tensors[f"{number}.coordinates"])
            metadata[str(number)] = "\n".join([site.name, expert, shape, base or ""])
        write_atomically(Path(path), save(tensors, metadata))

    def load(self, path: str | Path) -> None:
        """Take the values from a file that ``save`` wrote for the same coordinates and base.

        Raises:
            InvalidInput: another format, other coordinates or another base; nothing has changed.
        """
        from safetensors import SafetensorError, safe_open

        loaded = {}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"cannot read {path} as an adapter: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise InvalidInput(f"{path} is no file of {_FORMAT}, but {metadata.get('format')}")
        for number in range(len(metadata) - 1):
            name, expert, shape, base = metadata[str(number)].split("\n")
            site = Site(name, int(expert) if expert else None)
            self._check_site(path, site, shape, base, tensors[f"{number}.coordinates"])
            loaded[site] = tensors[f"{number}.values"]
        missing = self._targets.keys() - loaded.keys()
        if missing:
            raise InvalidInput(f"{path} has no values for {', '.join(s.name for s in missing)}")
        with torch.no_grad():
            for site, parameter in self.values().items():
                parameter.copy_(loaded[site])

    def _check_site(self, path, site, shape, base, coordinates) -> None:
        target = self._targets.get(site)
        if target is None:
            raise InvalidInput(f"{path} is for {site.name}, which this adapter does not train")
        here = "x".join(map(str, self.coordinates.shapes[site]))
        if shape != here:
            raise InvalidInput(f"{path}: {site.name} is {shape} there and {here} in this model")
        if not torch.equal(coordinates, self.coordinates.weights[site].cpu()):
            raise InvalidInput(f"{path} has other coordinates of {site.name} than this adapter")
        now = self._fingerprint(site, coordinates)
        if base and now and base != now:
            raise InvalidInput(
                f"{path} was trained on another base: the weights of {site.name} at its "
                "coordinates differ; load the model that it was trained on"
            )

    def _fingerprint(self, site: Site, coordinates: torch.Tensor) -> str | None:
        merged = self._merged.get(site)
        return fingerprint(self._targets[site], coordinates, merged and merged.before)


def _is_value(model: nn.Module, parameter: nn.Parameter) -> bool:
    return any(
        parameter is value
        for module in model.modules()
        if isinstance(module, SparseDelta)
        for value in module.values.values()
    )


def whole(values: torch.Tensor) -> torch.Tensor:
    """A sharded tensor (FSDP2) gathered; any other as it is."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values
