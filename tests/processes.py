"""Run a script as several ranks of ``torch.distributed`` on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start_ranks(script: str, *arguments: str, world: int = 2, **env: str) -> list:
    """Start ``script`` once a rank, as torchrun does; stderr goes to a pipe.

    The ranks meet on the loopback interface: finding the machine's own name may take minutes where
    there is no network.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"} | env
    return [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]


def finish_ranks(ranks: list, seconds: float = 300) -> list[tuple[int, str]]:
    """(exit code, stderr) of every rank; those still running then say where they hang."""
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGABRT)  # faulthandler prints the stacks
    return [
        (rank.returncode, error.decode()) for rank in ranks for _, error in [rank.communicate()]
    ]


def run_ranks(script: str, *arguments: str, world: int = 2, **env: str) -> None:
    """Run ``script`` as ``world`` ranks, each of which must end with 0."""
    for rank, (code, error) in enumerate(
        finish_ranks(start_ranks(script, *arguments, world=world, **env))
    ):
        assert code == 0, f"rank {rank} ended with {code}:\n{error[-4000:]}"
