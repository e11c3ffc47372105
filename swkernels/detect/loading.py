"""Load a model and its tokenizer from disk or the Hugging Face hub, safely and quietly."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from swkernels.documents import Fields, Maybe, Text, check_document
from swkernels.errors import InvalidInput
from swkernels.files import CONFIG, read_json
from swkernels.models.checkpoint import (
    INDEX,
    cached_folder,
    check_index,
    read_header,
    read_index,
)
from swkernels.models.gguf_head import check_gguf_head
from swkernels.models.unchanged import unchanged

from . import formats

DTYPES = ("auto", "float32", "bfloat16", "float16")

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_GGUF_HEAD = 1 << 20
_LONGEST_REASON = 300
_CONFIG = Fields({}, {"model_type": Maybe(Text(256))})


def load_model(
    name_or_path: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: object = None,
):
    """Load a language model for a scan.

    Args:
        name_or_path: a directory with config.json and safetensors, a .gguf file (needs the extra
            ``gguf``), or a name on the Hugging Face hub.
        device: "cpu", "cuda", "cuda:1", or "auto" (spread over the devices; needs accelerate).
            None takes a GPU where there is one.
        dtype: one of ``DTYPES``; "auto" and None keep the checkpoint's.
        trust_remote_code: run Python code that comes with the checkpoint. Pickled weights are
            never loaded.
        quantization_config: of transformers, to quantize while loading; not for a .gguf file.
            Without one, a checkpoint packed in fp8, mxfp4 or by compressed-tensors is unpacked
            while loading, on any device; see docs/detection.md.

    Returns:
        (model in eval mode, tokenizer, fingerprint or None); see ``fingerprint``.

    Raises:
        InvalidInput: whatever is wrong with the checkpoint, the device or the dtype, in one line.
    """
    device = check_device(device)
    check_dtype(dtype)
    where, options = source_of(name_or_path)
    options["trust_remote_code"] = trust_remote_code
    with quiet(), one_line_errors(str(name_or_path)):
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
            AutoTokenizer,
        )

        config = AutoConfig.from_pretrained(where, **options)
        encoder_decoder = getattr(config, "is_encoder_decoder", False)
        loader = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        if not Path(where).is_dir():
            _check_hub_index(where)
        if "gguf_file" in options:
            options |= _unpacking()
            packed = {"quant_method": "gguf"}
        else:
            options["use_safetensors"] = True
            packed = formats.packing(config)
            options |= formats.unpacking(str(name_or_path), packed)
        unpacks = "quantization_config" in options
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
            unpacks = False
        if device == "auto":
            options["device_map"] = "auto"
        with formats.explained(str(name_or_path), packed), unchanged(files_of(name_or_path)):
            model, info = loader.from_pretrained(
                where, dtype=_dtype(dtype), output_loading_info=True, **options
            )
    missing = sorted(info["missing_keys"])
    if missing:
        raise InvalidInput(
            f"{name_or_path} lacks {len(missing)} weights of a {type(model).__name__}, "
            f"{missing[0]} first: give the complete checkpoint of a language model"
        )
    if not packed:
        formats.check_leftovers(str(name_or_path), info["unexpected_keys"])
    if unpacks:
        formats.note(model, packed)
    if device != "auto":
        model = model.to(device)
    return model.eval(), tokenizer, _fingerprint_of(name_or_path)


def check_device(device: str | None) -> str:
    """Return the device to use, for None the GPU if there is one.

    Raises:
        InvalidInput: the device is unknown or not there.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        try:
            import accelerate  # noqa: F401
        except ImportError as error:
            raise InvalidInput(
                "device 'auto' needs the library accelerate: pip install accelerate, or name "
                "one device"
            ) from error
        return device
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise InvalidInput(
            f"unknown device {device!r}: expected cpu, cuda, cuda:N or auto"
        ) from error
    if parsed.type == "meta":
        raise InvalidInput("device 'meta' holds no weights: expected cpu, cuda, cuda:N or auto")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(
            f"device {device!r} is not there: PyTorch sees {torch.cuda.device_count()} GPUs; "
            "use cpu, or see swkernels doctor"
        )
    return device


def check_dtype(dtype: str | None) -> None:
    """Raise InvalidInput unless ``dtype`` is None or one of ``DTYPES``."""
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")


def _dtype(name: str | None):
    return "auto" if name in (None, "auto") else getattr(torch, name)


def fingerprint(path: str | Path) -> str:
    """Return a sha256 that tells checkpoints apart without reading their weights.

    It covers, of every .safetensors file in the directory, the name, the size in bytes and the
    header (each tensor's name, dtype, shape and place); of a .gguf file the size and the first
    MiB. It does not cover the weights' values, config.json or the tokenizer: two checkpoints of
    one architecture, such as a model and its fine-tuned twin, may share it.

    Raises:
        InvalidInput: a file is unreadable or truncated, or there is none.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_file():
        digest.update(f"{path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_GGUF_HEAD))
        return digest.hexdigest()
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InvalidInput(f"{path} holds no .safetensors file")
    for file in files:
        header = read_header(file)
        digest.update(f"{file.name}\n{file.stat().st_size}\n{len(header)}\n".encode())
        digest.update(header)
    return digest.hexdigest()


def _fingerprint_of(name_or_path: str | Path) -> str | None:
    """Return the fingerprint of what was loaded; None for a name whose files are not cached."""
    path = files_of(name_or_path)
    return None if path is None else fingerprint(path)


def files_of(name_or_path: str | Path) -> Path | None:
    """Where the files of a model are; None for a name whose files are not cached."""
    path = Path(name_or_path).expanduser()
    return path if path.exists() else cached_folder(str(name_or_path))


def source_of(name_or_path: str | Path) -> tuple[str, dict]:
    """Check what can be checked before anything is loaded; return where to load from, and how.

    Raises:
        InvalidInput: there is no such file or directory, or its files are damaged or no model's.
    """
    name = str(name_or_path)
    if not name:
        raise InvalidInput("the model's name is empty: give the directory of a checkpoint")
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InvalidInput(
                f"{path} is a file: give the directory of a checkpoint or a .gguf file"
            )
        _check_gguf(path)
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        _check_directory(path)
        return str(path), {}
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise InvalidInput(f"there is no model at {name!r}: give the directory of a checkpoint")
    return name, {}


def _unpacking() -> dict:
    """What makes transformers unpack a .gguf file to plain weights, and say that they are."""
    try:
        from transformers import GgufConfig
    except ImportError:  # an older transformers, which always does
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _check_gguf(path: Path) -> None:
    check_gguf_head(path)
    for library in ("gguf", "accelerate"):
        try:
            __import__(library)
        except ImportError as error:
            raise InvalidInput(
                f"reading {path.name} needs the library {library}: pip install 'swkernels[gguf]'"
            ) from error


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise InvalidInput(
            f"{path} has no config.json: give the directory that save_pretrained wrote"
        )
    _check_config(path / "config.json")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        if pickles:
            raise InvalidInput(
                f"{path} holds only pickled weights ({pickles[0]}), which can run code and are "
                "never loaded: where you trust them, convert once with from_pretrained(...) and "
                "save_pretrained(...), which writes safetensors"
            )
        raise InvalidInput(f"{path} holds no weights: expected .safetensors files")
    for file in files:
        read_header(file)
    if (path / INDEX).is_file():
        check_index(path, {file.name for file in files})


def _check_config(path: Path) -> None:
    config = read_json(path, limits=CONFIG, special=True)  # transformers writes Infinity
    check_document(config, _CONFIG, path)


def _check_hub_index(name: str) -> None:
    """Refuse an index on the hub that names pickled weights; transformers would load them."""
    from transformers.utils import cached_file

    path = cached_file(
        name,
        INDEX,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is not None:
        read_index(Path(path))


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises for a bad checkpoint, in many kinds, into one line."""
    try:
        yield
    except (InvalidInput, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code of its own; --trust-remote-code runs it"
        elif "local_files_only" in str(error) or "offline" in str(error).lower():
            reason = "no such directory, and the hub has no such name or cannot be reached"
        raise InvalidInput(f"cannot load {name}: {reason[:_LONGEST_REASON]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, warnings and tables; then as it was."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Of a checkpoint that is to be unpacked: that it says itself how it is packed.
            warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
