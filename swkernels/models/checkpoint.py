"""Checkpoints on disk as named tensors: memory-mapped, nothing is copied and no model is built."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from swkernels.errors import InvalidInput

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
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
            header = json.loads(read_header(file))
            header.pop("__metadata__", None)
            twice = sorted(header.keys() & found.keys())
            if twice:
                raise InvalidInput(
                    f"{file.parent} holds {twice[0]} twice, once in {file.name}: give one file"
                )
            try:
                handle = stack.enter_context(safe_open(file, "pt"))
            except (OSError, SafetensorError) as error:
                raise InvalidInput(f"cannot read the checkpoint {file}: {error}") from error
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


def check_index(path: Path, present: set[str]) -> set[str]:
    """Return the names of the files that the index in folder ``path`` lists.

    Raises:
        InvalidInput: the index is damaged, or one of its files is not ``present``.
    """
    try:
        wanted = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        missing = [path / name for name in sorted(wanted - present)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path / INDEX} is unreadable: download it again") from error
    if missing:
        raise InvalidInput(
            f"{missing[0]} is missing, {len(missing)} of {len(wanted)} files of weights "
            "are: download them again"
        )
    return wanted


def read_header(file: Path) -> bytes:
    """Return a safetensors header, checked against the size of the file.

    The format: 8 bytes, little-endian, the header's length n; n bytes of JSON; the data, to which
    the header's ``data_offsets`` refer (github.com/huggingface/safetensors, README).

    Raises:
        InvalidInput: no such file, another format, or truncated.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError("no header")
            header = stream.read(length)
        tensors = json.loads(header)
        ends = [t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InvalidInput(
            f"{file} is not a readable safetensors file ({size} bytes): download it again"
        ) from error
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise InvalidInput(
            f"{file} is {state}: expected {expected} bytes, got {size}; download it again"
        )
    return header


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
