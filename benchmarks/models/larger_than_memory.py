"""Scan a checkpoint larger than the memory there is: layer by layer, and with accelerate's offload.

    python -m benchmarks.models.larger_than_memory            # 8 GB under 3 GB; about 10 minutes

A random Llama-shaped checkpoint is written once to the cache folder. Each way runs in a process of
its own in a control group whose memory is limited, page cache included, from files that are not in
the cache. Records go to ``benchmarks/results/scale/``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import machine, records
from benchmarks.models.smollm2 import cache_directory
from swkernels.files import in_folder, write_atomically

FOLDER = records.RESULTS / "scale"
WAYS = ("stream", "accelerate")
LIMIT = 3_000_000_000
BUDGET = 64_000_000  # bytes of hidden states
SHAPE = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=17, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096,
)  # fmt: skip
SAMPLES, LENGTH = 16, 64


def checkpoint(folder: Path, shape: dict) -> Path:
    """A random bfloat16 Llama of ``shape`` in ``folder``, a file a layer; made where it is not."""
    if folder.exists():
        return folder
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from swkernels.models.streaming import parts_of

    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator).mul_(0.02).bfloat16()

    def tensor(parameter):
        if parameter.dim() == 1:
            return torch.ones(parameter.shape, dtype=torch.bfloat16)
        start = int(torch.randint(len(noise), (1,), generator=generator))
        repeats = -(-(start + parameter.numel()) // len(noise))
        return (
            noise.repeat(repeats)[start : start + parameter.numel()].view(parameter.shape).clone()
        )

    def write(aside: Path) -> None:
        config.save_pretrained(aside)
        files: dict[str, str] = {}
        names = {name: None for name, _ in model.named_parameters()}
        parts = [*parts_of(model)[0], ""]
        for number, part in enumerate(parts):
            here = [name for name in names if name.startswith(f"{part}." if part else "")]
            here = [name for name in here if name not in files]
            file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
            save_file({name: tensor(model.get_parameter(name)) for name in here}, aside / file)
            files |= dict.fromkeys(here, file)
        index = {"metadata": {}, "weight_map": files}
        (aside / "model.safetensors.index.json").write_text(json.dumps(index))

    in_folder(folder, "config.json", write)
    return folder


def run_here(way: str, folder: Path, vocabulary: int) -> dict:
    """One way in this process: seconds, bytes read from the disk, peak memory, peaks."""
    from transformers import AutoModelForCausalLM

    import swkernels
    from swkernels.detect.loading import quiet
    from swkernels.detect.streamed import scan_stream

    ids = torch.randint(
        0, vocabulary, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    before, start = _read_bytes(), time.perf_counter()
    with quiet(), torch.no_grad():
        if way == "stream":
            report = scan_stream(
                folder, ids, device="cpu", budget=BUDGET, samples=SAMPLES, verify=False
            )
            peaks = [
                [layer[side]["channel"], layer[side]["value"]]
                for layer in report.to_dict()["layers"]
                for side in ("in_peak", "out_peak")
            ]
        else:
            with tempfile.TemporaryDirectory() as offload:
                model = AutoModelForCausalLM.from_pretrained(
                    folder, device_map={"": "disk"}, offload_folder=offload, dtype=torch.bfloat16
                )
                with swkernels.track(model) as handle:
                    for row in ids:
                        model.model(input_ids=row[None], use_cache=False)
            sides = (side for site in handle.peaks() for side in (site.inputs, site.outputs))
            peaks = [[int(p.values.argmax()), float(p.values.max())] for p in sides]
    seconds, read = time.perf_counter() - start, _read_bytes() - before
    return {"seconds": seconds, "read": read, "memory": _peak_memory(), "peaks": peaks}


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def _peak_memory() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A control group whose processes may use ``limit`` bytes, of version 1 or 2."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / f"swkernels-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def measure(way: str, folder: Path, vocabulary: int, limit: int) -> dict:
    """``run_here`` in a process of its own under a limit of memory, from files not in the cache."""
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with control_group(limit) as group:
        enter = lambda: (group / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
        command = [sys.executable, "-m", "benchmarks.models.larger_than_memory", "--way", way]
        command += ["--folder", str(folder), "--vocabulary", str(vocabulary)]
        done = subprocess.run(command, preexec_fn=enter, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"way": way, "failed": done.returncode}
    return {"way": way} | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--folder", type=Path, default=cache_directory() / "random-llama-8gb")
    parser.add_argument("--vocabulary", type=int, default=SHAPE["vocab_size"])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run_here(given.way, given.folder, given.vocabulary)))
        return
    folder = checkpoint(given.folder, SHAPE)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rounds: list[dict] = []
    for number in range(given.rounds):
        for way in WAYS:
            rounds.append({"round": number} | measure(way, folder, SHAPE["vocab_size"], LIMIT))
            print({k: v for k, v in rounds[-1].items() if k != "peaks"}, flush=True)
    peaks = [found.pop("peaks", None) for found in rounds]
    document = {
        "schema": "swkernels.scale/1",
        **machine.provenance(),
        "device": machine.describe(torch.device("cpu")),
        "checkpoint": size, "limit": LIMIT, "budget": BUDGET, "samples": SAMPLES,
        "length": LENGTH, "shape": SHAPE, "same_peaks": all(p == peaks[0] for p in peaks),
        "rounds": rounds,
    }  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    write_atomically(FOLDER / "larger-than-memory.json", json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
