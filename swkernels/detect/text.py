"""Text for a scan: where it comes from, and how it becomes samples of token ids."""

from __future__ import annotations

import itertools
import json
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from swkernels.errors import InvalidInput

DEFAULT_SOURCE = f"pydoc_data.topics of Python {platform.python_version()}"
SPECIAL_TOKENS = ("tokenizer", "force", "none")

_DATASET_TEXTS = 2000  # texts read of a Hugging Face dataset; far more than a scan takes
_CHARACTERS_PER_TOKEN = 8  # a first guess at how much of a long text is needed
_EDGE_TOKENS = 16  # where a long text was cut, the last tokens may differ from the whole text's
_PROBE = "a"


def default_text() -> str:
    """Return English prose that every Python carries: the paragraphs of ``pydoc_data.topics``.

    Grammar, code, headings, lists and repeated paragraphs are left out. The same Python version
    always gives the same text, of well over 10,000 words.

    Raises:
        InvalidInput: this Python was packaged without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InvalidInput(
            "this Python carries no pydoc_data.topics, the default text: give a text"
        ) from error
    paragraphs = (
        paragraph
        for name in sorted(topics)
        for paragraph in re.split(r"\n\s*\n", topics[name])
        if _is_prose(paragraph)
    )
    return "\n\n".join(dict.fromkeys(" ".join(p.split()) for p in paragraphs))


def _is_prose(paragraph: str) -> bool:
    """Tell sentences at the left margin from grammar, code, headings, lists and footnotes."""
    lines = paragraph.strip("\n").splitlines()
    if not lines or not re.match(r'["A-Z]', lines[0]) or not lines[-1].rstrip().endswith("."):
        return False
    if any(line.startswith((" ", "\t")) for line in lines) or "::=" in paragraph:
        return False
    plain = sum(c.isalpha() or c in " \n,.'" for c in paragraph)
    return len(paragraph.split()) >= 12 and plain >= 0.93 * len(paragraph)


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        InvalidInput: it is not there, cannot be read, is not UTF-8, or is empty.
    """
    with reading(path, "text", "a UTF-8 text file"):
        text = Path(path).read_text(encoding="utf-8-sig")
    if not text.strip():
        raise InvalidInput(f"the text {path} is empty: give a text of at least 2 tokens")
    return text


@contextmanager
def reading(path: str | Path, what: str, instead: str) -> Iterator[None]:
    """Turn what goes wrong while a text file is read into one line.

    Args:
        what: it should be.
        instead: what to give.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise InvalidInput(
            f"cannot read the {what} {path}: {error.strerror or error}; give {instead}"
        ) from error


def read_dataset(name: str) -> list[str]:
    """Return the texts of a data set.

    Args:
        name: a ``.txt`` file, a ``.jsonl`` file whose lines are objects with a ``text``, or a
            Hugging Face data set, ``NAME`` or ``NAME:CONFIGURATION`` (the ``text`` column of the
            train split, its first 2000 texts; needs the library ``datasets``).

    Raises:
        InvalidInput: it is not there or holds no text.
    """
    suffix = Path(name).suffix.lower()
    if suffix == ".txt":
        return [read_text(name)]
    if suffix == ".jsonl":
        texts = _json_lines(name)
    elif Path(name).exists():
        raise InvalidInput(f"{name}: expected a .txt or .jsonl file or a Hugging Face data set")
    else:
        rows = dataset_rows(name, "train", "a .txt or .jsonl file", _DATASET_TEXTS)
        texts = [row.get("text") for row in rows]
        if not all(isinstance(text, str) for text in texts):
            raise InvalidInput(f"the data set {name} has no column of strings named text")
    if not any(text.strip() for text in texts):
        raise InvalidInput(f"the data set {name} holds no text: its texts are all empty")
    return texts


def _json_lines(path: str) -> list[str]:
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise InvalidInput(
                f'{path}, line {number}: expected a JSON object with a string "text"'
            )
        texts.append(text)
    return texts


def dataset_rows(name: str, split: str, instead: str, most: int | None = None) -> list[dict]:
    """Return the rows of a Hugging Face data set; needs the library ``datasets``.

    Args:
        name: ``NAME`` or ``NAME:CONFIGURATION``.
        instead: the files that could be given in its place.
        most: the first so many, of which no more is loaded; None for all.

    Raises:
        InvalidInput: the library is missing, or the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise InvalidInput(
            f"there is no file {name}, and a Hugging Face data set needs the library datasets: "
            f"pip install 'swkernels[datasets]', or give {instead}"
        ) from error
    path, _, configuration = name.partition(":")
    streaming = {} if most is None else {"streaming": True}
    try:
        rows = datasets.load_dataset(path, configuration or None, split=split, **streaming)
        return list(itertools.islice(rows, most))
    except Exception as error:  # datasets raises many kinds, for the network, names and formats
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidInput(
            f"cannot load the data set {name}: {lines[0]}; check the name and the network, or "
            f"give {instead}"
        ) from error


def make_samples(
    text_or_texts: str | Sequence[str],
    tokenizer,
    *,
    samples: int,
    length: int,
    special_tokens: str,
) -> list[torch.Tensor]:
    """Cut a text, or texts one after the other, into at most ``samples`` windows of tokens.

    Args:
        text_or_texts: the text or texts.
        tokenizer: of Hugging Face's kind: called with a text, ``bos_token_id``, ``eos_token_id``.
        samples, length: how many windows of how many tokens, special tokens among them.
        special_tokens: what every window gets: "tokenizer" what the tokenizer adds by itself to a
            text, "force" a BOS at its start (EOS where there is no BOS), "none" nothing.

    Returns:
        int64 [S_i] tensors, S_i = ``length`` except that the last may be shorter. A last window
        with one token of the text is dropped unless it is the only one.

    Raises:
        InvalidInput: no text, a text shorter than one token, an unknown policy, or no room.
    """
    before, after = _special_tokens(tokenizer, special_tokens)
    room = length - len(before) - len(after)
    if room < 1:
        raise InvalidInput(
            f"length {length} leaves no room for text beside {len(before) + len(after)} special "
            "tokens: give a larger length"
        )
    texts = [text_or_texts] if isinstance(text_or_texts, str) else text_or_texts
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InvalidInput("the text is empty: give a text of at least 2 tokens")
    stream = _stream(texts, tokenizer, samples * room)
    if not stream:
        raise InvalidInput("the text is shorter than one token: give a longer text")
    windows = [stream[start : start + room] for start in range(0, len(stream), room)]
    if len(windows) > 1 and len(windows[-1]) < min(2, room):
        windows.pop()
    return [torch.tensor(before + window + after, dtype=torch.int64) for window in windows]


def _stream(texts: list[str], tokenizer, needed: int) -> list[int]:
    """Return the first ``needed`` tokens of the texts, reading no more text than that takes."""
    stream: list[int] = []
    for text in texts:
        missing = needed - len(stream)
        if missing <= 0:
            break
        end = _CHARACTERS_PER_TOKEN * (missing + _EDGE_TOKENS)
        ids = _encode(tokenizer, text[:end])
        while end < len(text) and len(ids) < missing + _EDGE_TOKENS:
            end *= 2
            ids = _encode(tokenizer, text[:end])
        stream += ids[:missing]
    return stream


def _encode(tokenizer, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is cut into windows, so no warning.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _special_tokens(tokenizer, policy: str) -> tuple[list[int], list[int]]:
    """Return the tokens before and after every window."""
    if policy == "none":
        return [], []
    if policy == "force":
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token is not None:
                return [token], []
        raise InvalidInput(
            "special tokens 'force': the tokenizer has neither a BOS nor an EOS token; use "
            "'tokenizer' or 'none'"
        )
    if policy != "tokenizer":
        raise InvalidInput(
            f"unknown policy {policy!r} for special tokens: expected one of "
            f"{', '.join(SPECIAL_TOKENS)}"
        )
    bare, whole = _encode(tokenizer, _PROBE), list(tokenizer(_PROBE)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise InvalidInput(
        "cannot tell which special tokens the tokenizer adds by itself: use 'force' or 'none'"
    )
