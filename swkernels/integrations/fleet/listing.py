"""The list of checkpoints: a line each, plain or JSON, checked as a whole before anything runs."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from swkernels.errors import InvalidInput
from swkernels.files import CONFIG, open_regular, parse_json

# What a line may set, as the options of ``swkernels scan``, and of which type it is.
OPTIONS: dict[str, type] = {
    "text": str,
    "dataset": str,
    "eval_text": str,
    "samples": int,
    "length": int,
    "batch_size": int,
    "eval_tokens": int,
    "device": str,
    "dtype": str,
    "special_tokens": str,
    "methods": list,
    "max_candidates": int,
    "no_verify": bool,
    "backend": str,
    "seed": int,
    "stream": bool,
    "budget": str,
    "spill": str,
}
_FLAGS = {"methods": "--method"}
_MOST_ERRORS = 20  # shown in one message
_LONGEST_NAME = 80
_TAKEN = {"fleet.jsonl", "fleet.csv"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """One line of the list.

    Attributes:
        line: its number, from 1.
        model: a folder, a .gguf file or a name on the hub.
        folder: the name of its folder below the output; one path component, no other's.
        options: of ``swkernels scan``, by name.
    """

    line: int
    model: str
    folder: str
    options: dict = field(default_factory=dict)


def read_list(path: str | Path) -> list[Checkpoint]:
    """Read a list: a checkpoint a line, ``#`` begins a comment; or an object of JSON a line.

    An object has ``path`` (the checkpoint), and may have ``name`` (of its folder below the output)
    and the options of ``OPTIONS``.

    Raises:
        InvalidInput: the file cannot be read or holds no checkpoint, or lines of it are wrong: the
            message names every line (the first 20), and duplicates with both.
    """
    try:
        with open_regular(path) as file:
            data = file.read(CONFIG.size + 1)
        if len(data) > CONFIG.size:
            raise InvalidInput(f"{path} has more than {CONFIG.size} bytes: split the list")
        lines = data.decode("utf-8").splitlines()
    except OSError as error:
        raise InvalidInput(
            f"cannot read the list {path}: {error.strerror or error}; give a file that is there"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8: {error}; give a text file") from error
    errors: list[str] = []
    found: list[tuple[int, str, str | None, dict]] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(lines, 1):
        text = text.strip()
        if not text or text.startswith("#"):
            continue
        try:
            model, name, options = _entry(text)
            _check_model(model)
            same = _same(model) if name is None else f"name {name.lower()}"
            if same in seen:
                raise InvalidInput(f"{name or model} is already in line {seen[same]}")
            seen[same] = number
            found.append((number, model, name, options))
        except InvalidInput as error:
            errors.append(f"line {number}: {error}")
    if errors:
        more = f"; and {len(errors) - _MOST_ERRORS} more" if len(errors) > _MOST_ERRORS else ""
        raise InvalidInput(f"{path}: {'; '.join(errors[:_MOST_ERRORS])}{more}")
    if not found:
        raise InvalidInput(f"{path} names no checkpoint: give one a line")
    names = safe_names([name or model for _, model, name, _ in found])
    return [
        Checkpoint(number, model, folder, options)
        for (number, model, _, options), folder in zip(found, names)
    ]


def safe_names(models: list[str]) -> list[str]:
    """One name of a folder each: one path component, plain ASCII, unique also where case is not.

    A name that had to be changed, or that several would have, ends in a digest of the model's, so
    that it does not depend on the order of the list.
    """
    plain = [_plain(model) for model in models]
    count = Counter(name.lower() for name, _ in plain)
    return [
        f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
        if changed or count[name.lower()] > 1 or name.lower() in _TAKEN
        else name
        for model, (name, changed) in zip(models, plain)
    ]


def arguments(options: dict) -> list[str]:
    """The options as arguments of ``swkernels scan``."""
    found = []
    for name in OPTIONS:
        value = options.get(name)
        if value is None or value is False:
            continue
        flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
        for one in value if isinstance(value, list) else [value]:
            found.append(flag)
            if one is not True:
                found.append(str(one))
    return found


def _entry(text: str) -> tuple[str, str | None, dict]:
    if not text.startswith("{"):
        return re.split(r"\s+#", text, maxsplit=1)[0], None, {}
    entry = parse_json(text.encode(), "this object", limits=CONFIG)
    options = dict(entry)
    model, name = options.pop("path", None), options.pop("name", None)
    if not isinstance(model, str) or not model:
        raise InvalidInput('expected "path", a folder, a .gguf file or a name on the hub')
    if name is not None and (not isinstance(name, str) or not name):
        raise InvalidInput(f'expected "name" to be a text, got {name!r}')
    for key, value in options.items():
        if key not in OPTIONS:
            raise InvalidInput(f"unknown option {key!r}; there are {', '.join(OPTIONS)}")
        kind = OPTIONS[key]
        right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not right or (kind is list and not all(isinstance(v, str) for v in value)):
            raise InvalidInput(f"{key} must be of type {kind.__name__}, got {value!r}")
    return model, name, options


def _check_model(model: str) -> None:
    if "\0" in model or model.startswith("-"):
        raise InvalidInput(f"{model!r} is no checkpoint: expected a path or a name on the hub")
    if _path(model):
        return
    if model.lower().endswith(".gguf") or not _HUB_NAME.fullmatch(model) or ".." in model:
        raise InvalidInput(f"{model!r} is not there and no name on the hub")


def _same(model: str) -> str:
    path = _path(model)
    return str(path.resolve()) if path else model


def _path(model: str) -> Path | None:
    path = os.path.expanduser(model)
    return Path(path) if os.path.exists(path) else None  # False as well where a name is too long


def _plain(model: str) -> tuple[str, bool]:
    """A name made of letters, digits, ``.``, ``_`` and ``-``, and whether something was lost."""
    path = _path(model)
    name = path.resolve().name if path else model.replace("/", "--")
    kept = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[:_LONGEST_NAME].rstrip(".")
    return kept or "model", kept != name
