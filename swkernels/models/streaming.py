"""A Hugging Face model of which one part at a time is in memory, read from safetensors files.

The modules are the model's own. A part is a block of its text stacks, or an embedding or the head
outside them; the rest (norms, small projections) stays in memory. ``use(part)`` puts the weights
of one part in their places and has the next one's read meanwhile, so that at most two are there.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from swkernels.errors import InvalidInput

from .checkpoint import DTYPES, find_checkpoint, weight_files
from .empty import Converter, Places, put_back, tied_names
from .safetensors_header import load_header
from .structure import base_of, stacks, text_stacks

_PIECE = 64 << 20  # bytes of one call that reads


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: the bytes from ``offset`` on in ``file``."""

    file: Path
    offset: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class PartStream:
    """The parts of a model, in the order in which a forward needs them.

    Attributes:
        model: its parts' weights are on the meta device while they are not used.
        parts: name -> module.
        blocks: the names of those that are blocks.
        device: where the weights of a part are while it is used.
        bytes_read: of weights, so far.
    """

    def __init__(self, model: nn.Module, places: dict[str, Place], device: torch.device, dtype):
        self.model = model
        self.device = device
        self.parts, head = parts_of(model)
        self.blocks = [
            name
            for name, module in self.parts.items()
            if name != head and not isinstance(module, nn.Embedding)
        ]
        names = list(self.parts)
        self._order = {name: i for i, name in enumerate(names)}
        self._following = {a: b for a, b in zip(names, names[1:]) if b != head}
        self.bytes_read = 0
        self._places = places
        self._converter = Converter(model, device, dtype)
        self._wanted = self._tensors_of_parts()
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-part")
        self._ahead: tuple[str, Future] | None = None
        self._used: tuple[str, Places] | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        for name, module in self.parts.items():
            missing = [key for key, weight in module.named_parameters() if weight.is_meta]
            if missing and not self._wanted[name]:
                raise InvalidInput(
                    f"the checkpoint has no weights of {name} ({missing[0]} first): give the "
                    f"complete checkpoint of a {type(model).__name__}"
                )
        self._converter.fill("", self._read(""))

    def use(self, part: str, ahead: bool = True) -> None:
        """Put the weights of ``part`` in their places and those of the part before away.

        The block that comes next in their order is read meanwhile, where ``ahead`` asks for it.

        Raises:
            InvalidInput: a weight is missing, or its file was cut off.
        """
        if self._used is None or self._used[0] != part:
            self.put_away()
            self._used = (part, self._converter.fill(part, self._take(part)))
            for key, weight in self.parts[part].named_parameters():
                if weight.is_meta:
                    raise InvalidInput(
                        f"the checkpoint lacks {part}.{key}: give the complete checkpoint of a "
                        f"{type(self.model).__name__}"
                    )
        following = self._following.get(part)
        if ahead and following is not None and self._ahead is None:
            self._ahead = (following, self._pool.submit(self._read, following))

    def expect(self, block: str) -> None:
        """Say that after the embeddings ``block`` comes first: those before it are not run."""
        for name in self._following:
            if name not in self.blocks and self._following[name] in self.blocks:
                self._following[name] = block

    def order(self, part: str) -> int:
        """The place of a part among ``parts``."""
        return self._order[part]

    def bytes_of(self, part: str) -> int:
        """The size of a part's weights in the checkpoint."""
        return sum(self._places[key].bytes for key, _ in self._wanted[part])

    def put_away(self) -> None:
        """Leave no part's weights in the model."""
        if self._used is not None:
            put_back(self._used[1])
            self._used = None

    def close(self) -> None:
        """Stop reading, close the files."""
        self.put_away()
        self._pool.shutdown(cancel_futures=True)
        self._ahead = None
        while self._files:
            os.close(self._files.popitem()[1])

    def _take(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a part: those that were read ahead, if they are its."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            name, future = ahead
            tensors = future.result()
            if name == part:
                return self._for_current_stream(tensors)
            del tensors, future, ahead  # before the right ones are read
        return self._for_current_stream(self._read(part))

    def _for_current_stream(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._side is not None:
            current = torch.cuda.current_stream(self.device)
            for tensor in tensors.values():  # its memory is not reused before this stream is done
                tensor.record_stream(current)
        return tensors

    def _read(self, part: str) -> dict[str, torch.Tensor]:
        tensors = {name: self._read_tensor(key) for key, name in self._wanted[part]}
        if self._side is not None:
            with torch.cuda.stream(self._side):
                tensors = {
                    name: tensor.to(self.device, non_blocking=True)
                    for name, tensor in tensors.items()
                }
            self._side.synchronize()
        return tensors

    def _read_tensor(self, key: str) -> torch.Tensor:
        place = self._places[key]
        data = torch.empty(place.bytes, dtype=torch.uint8, pin_memory=self._side is not None)
        view = memoryview(data.numpy())
        done = 0
        try:
            if place.file not in self._files:
                self._files[place.file] = os.open(place.file, os.O_RDONLY)
            while done < place.bytes:
                piece = view[done : done + _PIECE]
                got = os.preadv(self._files[place.file], [piece], place.offset + done)
                if not got:
                    raise InvalidInput(
                        f"{place.file} ends inside {key}: it was cut off while it was read; "
                        "restore the file and start again"
                    )
                done += got
        except OSError as error:
            raise InvalidInput(
                f"cannot read {key} from {place.file}: {error.strerror or error}"
            ) from error
        self.bytes_read += done
        return data.view(place.dtype).view(place.shape)

    def _tensors_of_parts(self) -> dict[str, list[tuple[str, str]]]:
        """Of every part ("" for the rest) its tensors: (name in the checkpoint, name to give)."""
        wanted: dict[str, list[tuple[str, str]]] = defaultdict(list)
        unused = _outside_text(self.model)
        tied = tied_names(self.model)
        targets = {key: self._converter.target(key) for key in self._places}
        stored = set(targets.values())
        for key, target in targets.items():
            if target is None or target.startswith(unused):
                continue  # transformers leaves out what a model does not have, too
            owner = self._owner(target)
            wanted[owner].append((key, key))
            for other in tied.get(target, ()):
                if other not in stored and not (owner and self._owner(other) == owner):
                    wanted[self._owner(other)].append((key, other))
        return wanted

    def _owner(self, name: str) -> str:
        """The part that the parameter ``name`` lies in; "" where it is none."""
        while name:
            name = name.rpartition(".")[0]
            if name in self.parts:
                return name
        return ""


@contextmanager
def open_stream(
    model: nn.Module, places: dict[str, Place], device, dtype: torch.dtype
) -> Iterator[PartStream]:
    """A context with the ``PartStream`` of a model over its checkpoint.

    Args:
        model: from ``empty_model``.
        places: of its weights, from ``stored_places``.
        device: where the weights of a part go.
        dtype: of the weights in memory.

    Raises:
        InvalidInput: the checkpoint is incomplete, or does not belong to the model.
    """
    stream = PartStream(model, places, torch.device(device), dtype)
    try:
        yield stream
    finally:
        stream.close()


def stored_places(source: str | Path) -> dict[str, Place]:
    """Where every tensor of a checkpoint lies, from the headers of its files.

    Raises:
        InvalidInput: as ``open_checkpoint``; or a tensor's type packs values.
    """
    places: dict[str, Place] = {}
    for file in weight_files(find_checkpoint(source)):
        header = load_header(file)
        for name, entry in header.tensors.items():
            if name in places:
                raise InvalidInput(
                    f"{file.parent} holds {name} twice, once in {file.name}: give one file"
                )
            if entry["dtype"] not in DTYPES:
                raise InvalidInput(f"{file}: {name} is {entry['dtype']}, which cannot be streamed")
            begin, end = entry["data_offsets"]
            places[name] = Place(
                file, 8 + len(header.raw) + begin, end - begin, DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
            )  # fmt: skip
    return places


def parts_of(model: nn.Module) -> tuple[dict[str, nn.Module], str | None]:
    """Embeddings, blocks of the text stacks and head of a model, by name; the name of the head."""
    blocks = {
        name: block
        for stack in text_stacks(stacks(base_of(model)[0]))
        for _, name, block in stack.blocks
    }
    outside = {
        name: module
        for name, module in model.named_modules()
        if not any(name == block or name.startswith(f"{block}.") for block in blocks)
    }
    embeddings = {n: m for n, m in outside.items() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {n: m for n, m in outside.items() if m is head and n not in embeddings}
    return {**embeddings, **blocks, **heads}, next(iter(heads), None)


def _outside_text(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the blocks that no text passes."""
    every = stacks(base_of(model)[0])
    kept = text_stacks(every)
    return tuple(f"{stack.name}." for stack in every if stack not in kept)
