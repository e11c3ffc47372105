"""Checkpoints on disk as named tensors: memory-mapped, nothing is copied and no model is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from swkernels.documents import Fields, MapOf, Maybe, Number, Text, check_document
from swkernels.errors import InvalidInput
from swkernels.files import Limits, read_json

from .safetensors_header import load_header

INDEX = "model.safetensors.index.json"
_INDEX_LIMITS = Limits(size=100_000_000, depth=8, values=4_000_000)
_INDEX_FIELDS = Fields(
    {"weight_map": MapOf(Text(longest=255))},
    {"metadata": Maybe(Fields({}, {"total_size": Maybe(Number(0, special=False))}))},
)
# What a safetensors header calls the types that hold one value an element.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of safetensors files by name, in natural order (layer 2 before layer 10).

    ``checkpoint[name]`` is a view of the file, in its own pages: nothing is read before it is
    looked at, and what is written to it stays in this process. It keeps its file mapped as long as
    it lives, also when the checkpoint is closed.

    Attributes:
        label: what it is called in messages.
        files: its .safetensors files.
    """

    def __init__(self, label: str, files: list[Path], stack: ExitStack):
        from safetensors import SafetensorError, safe_open

        self.label = label
        self.files = tuple(files)
        self._handles: dict[str, object] = {}
        found: dict[str, dict] = {}
        for file in files:
            header = load_header(file).tensors
            twice = sorted(header.keys() & found.keys())
            if twice:
                raise InvalidInput(
                    f"{file.parent} holds {twice[0]} twice, once in {file.name}: give one file"
                )
            try:
                handle = stack.enter_context(safe_open(file, "pt"))
            except (OSError, SafetensorError) as error:
                raise InvalidInput(f"cannot read the checkpoint {file}: {error}") from error
            if header.keys() != set(handle.keys()):
                raise InvalidInput(f"{file} changed while it was opened: open it when it is whole")
            found |= header
            self._handles |= dict.fromkeys(header, handle)
        self._headers = {name: found[name] for name in sorted(found, key=natural)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._handles[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the headers alone."""
        return {name: tuple(entry["shape"]) for name, entry in self._headers.items()}

    def dtype(self, name: str) -> torch.dtype | None:
        """From the header alone; None for a type that packs several values into an element."""
        return DTYPES.get(self._headers[name]["dtype"])

    def read(self, name: str, index=...) -> torch.Tensor:
        """The tensor, or a part of it as ``index`` says: then only that part is read."""
        return self[name] if index is ... else self._handles[name].get_slice(name)[index]


@contextmanager
def open_checkpoint(source: str | Path) -> Iterator[Checkpoint]:
    """A context with the ``Checkpoint`` at ``source``; leaving it closes the files.

    Args:
        source: a .safetensors file; a folder of them, with or without an index; or the name of a
            model whose files are in the local cache of the Hugging Face hub.

    Raises:
        InvalidInput: nothing there, pickled weights alone, a file that the index names is missing,
            or one is damaged or truncated.
    """
    path = find_checkpoint(source)
    with ExitStack() as stack:
        yield Checkpoint(str(source), weight_files(path), stack)


def find_checkpoint(source: str | Path) -> Path:
    """Return the file or folder that ``source`` is or names; see ``open_checkpoint``."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    cached = cached_folder(str(source))
    if cached is None:
        raise InvalidInput(
            f"cannot read {source}: there is no such file or folder, and the local Hugging Face "
            "cache has no such model; download it first"
        )
    return cached


def cached_folder(name: str) -> Path | None:
    """The folder of a model of this name in the local cache of the Hugging Face hub, if any."""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:  # it cannot be a name there
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def weight_files(path: Path) -> list[Path]:
    """Return the .safetensors files of a checkpoint, those that its index names where it has one.

    Raises:
        InvalidInput: there is none, or one is missing.
    """
    if not path.is_dir():
        return [path]
    present = sorted(path.glob("*.safetensors"))
    if (path / INDEX).is_file():
        named = check_index(path, {file.name for file in present})
        return [path / name for name in sorted(named)]
    if not present:
        raise InvalidInput(f"{path} holds no .safetensors file")
    return present


def read_index(where: Path) -> dict[str, str]:
    """Return the file of each tensor as an index says, without a look at the files.

    Raises:
        InvalidInput: the index is damaged, or names something that is no file of weights in its
            own folder.
    """
    try:
        document = read_json(where, limits=_INDEX_LIMITS)
        check_document(document, _INDEX_FIELDS, where)
    except InvalidInput as error:
        raise InvalidInput(f"{where} is unreadable: download it again ({error})") from error
    folded: dict[str, str] = {}
    for name in sorted(set(document["weight_map"].values())):
        _check_file_name(where, name)
        other = folded.setdefault(name.casefold(), name)
        if other != name:  # one file where capitals do not count, two elsewhere
            raise InvalidInput(
                f"{where} names {other} and {name}, which differ by capitals alone: rename one"
            )
    return document["weight_map"]


def check_index(path: Path, present: set[str]) -> set[str]:
    """Return the names of the files that the index in folder ``path`` lists, checked against them.

    What a file holds beyond what the index names belongs to the checkpoint, as for transformers.

    Raises:
        InvalidInput: the index is damaged, names something that is no file of weights in this
            very folder, or one of its files is not ``present``, damaged, or lacks a tensor; or a
            tensor is in two of them.
    """
    places = read_index(path / INDEX)
    wanted = set(places.values())
    missing = [path / name for name in sorted(wanted - present)]
    if missing:
        raise InvalidInput(
            f"{missing[0]} is missing, {len(missing)} of {len(wanted)} files of weights "
            "are: download them again"
        )
    _check_places(path, places, wanted)
    return wanted


def _check_file_name(where: Path, name: str) -> None:
    """Refuse what could lead out of the folder, on any system, or to pickled weights."""
    plain = name.isprintable() and not set(name) & set("/\\:")
    if not plain or not name.endswith(".safetensors"):
        raise InvalidInput(
            f"{where} names the file {name!r:.200}: expected the plain name of a .safetensors file "
            "in the same folder; do not use this checkpoint unless you know why"
        )


def _check_places(path: Path, places: Mapping[str, str], files: set[str]) -> None:
    """Check that each tensor is in the file that the index names, and in no other."""
    found: dict[str, str] = {}
    for file in sorted(files):
        for name in load_header(path / file).tensors:
            if name in found:
                raise InvalidInput(
                    f"{path} holds {name!r:.200} twice, in {found[name]} and {file}: give one file"
                )
            found[name] = file
    for name, file in places.items():
        if found.get(name) != file:
            instead = f"but {found[name]} has it" if name in found else "which lacks it"
            raise InvalidInput(
                f"{path / INDEX} says that {name!r:.200} is in {file}, {instead}: download the "
                "checkpoint again"
            )


def read_header(file: Path) -> bytes:
    """Return a safetensors header, checked against the size of the file; see ``load_header``.

    Raises:
        InvalidInput: no such file, another format, truncated, or an entry that is wrong.
    """
    return load_header(file).raw


def natural(name: str) -> list:
    """A sort key by which numbers in names count as numbers."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part)
            for part in re.split(r"(\d+)", name)]  # fmt: skip


def stores_transposed(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether linear layers are Conv1D (GPT-2), as the biases of those that are not square say.

    A square weight itself does not tell.

    Args:
        shapes: of the tensors of a model, by name.
    """
    for key, stored in shapes.items():
        bias = shapes.get(f"{key.removesuffix('weight')}bias")
        if key.endswith(".weight") and len(stored) == 2 and stored[0] != stored[1] and bias:
            return bias == stored[1:]
    return False
