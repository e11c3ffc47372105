"""What a checkpoint on disk holds: its tensors by name with their places, and its other files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from swkernels.errors import InvalidInput
from swkernels.models.checkpoint import find_checkpoint, weight_files
from swkernels.models.safetensors_header import Header, load_header

from .digests import hasher
from .manifest import NAME, File
from .reading import State, Stretch, check_same, state_of

# What a model is loaded from besides its weights, and weights in other formats.
_TEXTS = {".json", ".jsonl", ".txt", ".model", ".py", ".jinja", ".tiktoken", ".vocab", ".spm"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class Entry:
    """A tensor on disk.

    Attributes:
        name, dtype, shape: as in the header.
        file: the name of its file.
        stretch: where its bytes are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    stretch: Stretch


@dataclass(frozen=True)
class Contents:
    """A checkpoint on disk, of which the headers were read.

    Attributes:
        path: of the file or folder.
        headers: by file of weights: its size, and the digest of the bytes of its header.
        entries: the tensors by name, in the order in which the files hold them.
        others: the other files, by name.
        states: what tells whether a file has changed, by path.
        problems: (file, why) of files of weights that cannot be read.
    """

    path: Path
    headers: dict[str, File]
    entries: dict[str, Entry]
    others: dict[str, Stretch]
    states: dict[Path, State]
    problems: tuple[tuple[str, str], ...] = ()

    def check_same(self) -> None:
        """Raise InvalidInput if a file has changed since its header was read."""
        for path, state in self.states.items():
            check_same(path, state)

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return str(self.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}


def folder_of(path: Path) -> Path:
    """The folder that the names of files are relative to."""
    return path if path.is_dir() else path.parent


def look(source: str | Path, hash: str, known: tuple[str, ...] | None = None) -> Contents:
    """Read the headers of a checkpoint, and list its other files.

    Args:
        source: a safetensors file; a folder of them; or the name of a model in the local cache of
            the Hugging Face hub.
        hash: for the digests of the headers.
        known: the names of the files that should be there. What cannot be read is then one of the
            ``problems``; without it, an error.

    Raises:
        InvalidInput: nothing is there, or (``known`` is None) a file is damaged or missing.
    """
    path = find_checkpoint(source)
    problems: list[tuple[str, str]] = []
    files = _files(path, known, problems)
    headers: dict[str, File] = {}
    entries: dict[str, Entry] = {}
    states: dict[Path, State] = {}
    digest = hasher(hash)
    for file in files:
        try:
            states[file] = state_of(file)
            header = load_header(file)
        except InvalidInput as error:
            if known is None:
                raise
            problems.append((file.name, str(error)))
            continue
        headers[file.name] = File(file.name, states[file].size, digest(header.raw))
        for tensor in _tensors(file, header):
            if tensor.name in entries:
                twice = f"{tensor.name} is also in {entries[tensor.name].file}"
                if known is None:
                    raise InvalidInput(f"{file}: {twice}; give one file")
                problems.append((file.name, twice))
            entries.setdefault(tensor.name, tensor)
    others = _others(path, files)
    states |= {stretch.path: state_of(stretch.path) for stretch in others.values()}
    return Contents(path, headers, entries, others, states, tuple(problems))


def _files(path: Path, known: tuple[str, ...] | None, problems: list) -> list[Path]:
    try:
        return sorted(weight_files(path))
    except InvalidInput as error:
        if known is None:
            raise
        present = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if not present:
            raise
        problems.append((path.name, str(error)))
        return [file for file in present if file.name in known] or present


def _tensors(file: Path, header: Header) -> list[Entry]:
    """The tensors of a file, in the order of their bytes (and of their names, where empty)."""
    found = []
    for name, entry in header.tensors.items():
        start, end = entry["data_offsets"]
        stretch = Stretch(file, 8 + len(header.raw) + start, end - start)
        found.append(Entry(name, entry["dtype"], tuple(entry["shape"]), file.name, stretch))
    return sorted(found, key=lambda entry: (entry.stretch.start, entry.stretch.size, entry.name))


def _others(path: Path, files: list[Path]) -> dict[str, Stretch]:
    if not path.is_dir():
        return {}
    folders = [path, *(path / name for name in _FOLDERS if (path / name).is_dir())]
    weights = set(files)
    found = {}
    for file in sorted(file for folder in folders for file in folder.iterdir()):
        wanted = file.suffix.lower() in _TEXTS | _WEIGHTS and not file.name.startswith(".")
        if not wanted or file in weights or file.name.endswith(NAME) or not file.is_file():
            continue
        found[file.relative_to(path).as_posix()] = Stretch(file, 0, file.stat().st_size)
    return found


def rows_of(shape: tuple[int, ...], size: int, start: int, stop: int) -> tuple[int, int] | None:
    """The first and last row that the bytes from ``start`` to ``stop`` of a tensor touch.

    Rows are those of the tensor as a matrix [product of the other sizes, last size]; None where it
    has no rows.
    """
    rows = math.prod(shape[:-1])
    if len(shape) < 2 or not size or size % rows:
        return None
    width = size // rows
    return start // width, (stop - 1) // width
