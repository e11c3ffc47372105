"""The case of ``shared_scan``: two processes on two cores, and one process on one of them.

The scan of SmolLM2, not verified: the pass for the peaks and the second look. The processes are
started once, each pinned to its core with one thread, and have the model loaded; a call hands them
token ids and waits for the report.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import torch

from benchmarks import expected
from benchmarks.case import Case, Error, Provider, lazily
from benchmarks.models import smollm2

OP = "shared_scan"
ALONE = "one process on one core"
SAMPLES, LENGTH = 8, 512
_MEASURE = "entries of the report that differ from those of one process"
_ROOT = Path(__file__).parents[2]


class Team:
    """Processes that scan together, one a core, each with one thread.

    Args:
        folder: the checkpoint that each loads.
        cores: what they are pinned to.
    """

    def __init__(self, folder: Path, cores: list[int]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(len(cores)),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(_ROOT),
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.models.ranks", str(folder), str(core)],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, core in enumerate(cores)
        ]
        self._end = weakref.finalize(self, _end, self._processes)
        self._answers()  # they have loaded

    def scan(self, ids: torch.Tensor) -> dict:
        """The report of a scan of ids [N, S]."""
        asked = json.dumps(ids.tolist()) + "\n"
        for process in self._processes:
            process.stdin.write(asked)
            process.stdin.flush()
        return self._answers()[0]

    def close(self) -> None:
        """End the processes."""
        self._end()

    def _answers(self) -> list:
        lines = [process.stdout.readline() for process in self._processes]
        if not all(lines):
            raise RuntimeError("a process of the scan has ended; its error stands above")
        return [json.loads(line) for line in lines]


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def serve(folder: str, core: str) -> None:
    """Be one process of a team: a line of token ids in, a line of the report out."""
    os.sched_setaffinity(0, {int(core)})
    torch.set_num_threads(1)
    answer, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not answer
    from swkernels.detect.loading import load_model
    from swkernels.detect.ranks import Ranks
    from swkernels.detect.scan import scan

    model, _, _ = load_model(folder, device="cpu", dtype="float32")
    with Ranks.from_environment() as ranks:
        print(json.dumps("ready"), file=answer, flush=True)
        for line in sys.stdin:
            ids = torch.tensor(json.loads(line))
            settings = {"samples": len(ids), "length": ids.shape[1], "verify": False}
            report = scan(model, ids, ranks=ranks, **settings).to_dict()
            del report["created"]
            print(json.dumps(report if ranks.first else None), file=answer, flush=True)


def case(folder: Path | None = None, *, samples: int = SAMPLES, length: int = LENGTH) -> Case:
    """The checkpoint in ``folder``; by default SmolLM2. In float32, on a CPU."""
    folder = folder or smollm2.prepare()
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    teams: dict[int, Team] = {}

    def team(size: int) -> Team:
        if size not in teams:
            teams[size] = Team(folder, sorted(os.sched_getaffinity(0))[:size])
        return teams[size]

    def of(size: int):
        def make_call():
            together = team(size)
            return lambda inputs: {"report": together.scan(inputs["ids"])}

        return lazily(make_call)

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return {"ids": torch.randint(0, config.vocab_size, (samples, length), generator=generator)}

    def judge(inputs):
        right = of(1)(inputs)["report"]

        def error(outputs):
            found = outputs["report"]
            wrong = sum(found.get(part) != right[part] for part in right)
            return Error(wrong + len(set(found) - set(right)), 0, _MEASURE)

        return error

    def providers():
        cores = len(os.sched_getaffinity(0))
        missing = None if cores > 1 else "there is one core"
        return [
            Provider(ALONE, "bare", of(1)),
            Provider("swkernels", "ours", of(2), missing, note="two processes on two cores"),
        ]

    tokens = samples * length
    shape = {"tokens": tokens, "columns": config.intermediate_size, "rows": config.hidden_size}
    mlp = expected.swiglu_mlp(tokens, config.hidden_size, config.intermediate_size, "float32")
    return Case(
        OP, ("SmolLM2-135M",), f"{samples} x {length}", shape, "float32",
        config.num_hidden_layers * mlp, 8, make, judge, providers, seconds=120.0,
    )  # fmt: skip


if __name__ == "__main__":
    serve(*sys.argv[1:])
