"""A process that has imported everything and runs commands in forks of itself, killing some.

A fork starts at its work at once, so that moments drawn from its run time fall into the work and
not into the imports. ``Server`` is the side of the tests.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (minus the signal where one killed it), what it said."""

    code: int
    stderr: str
    seconds: float


class Server:
    """A context in which commands can be run.

    Args:
        folder: for its own files.
    """

    def __init__(self, folder: Path):
        self._stderr = folder / "stderr"

    def __enter__(self) -> Server:
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT,
            env=os.environ | quiet | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "0"},
        )  # fmt: skip
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def run(
        self,
        *arguments: object,
        after: float | None = None,
        send: int = signal.SIGKILL,
        hook: tuple | None = None,
        largest_file: int | None = None,
    ) -> Ended:
        """Run ``swkernels`` with ``arguments`` and wait for its end.

        Args:
            after: seconds until a signal is sent; None sends none.
            send: the signal.
            hook: (name of a function in tests.faults.hooks, its arguments): called before the
                command in its process.
            largest_file: bytes; a longer file cannot be written, as on a full disk.
        """
        request = {
            "arguments": [str(argument) for argument in arguments], "after": after,
            "send": int(send), "hook": hook and [str(part) for part in hook],
            "largest_file": largest_file, "stderr": str(self._stderr),
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code, seconds = json.loads(self._process.stdout.readline())
        return Ended(code, self._stderr.read_text(), seconds)


def _serve() -> None:
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import swkernels.guard
    import swkernels.integrations.transformers  # noqa: F401
    from swkernels.cli import main
    from swkernels.detect import page, plots, scan, streamed, table  # noqa: F401
    from swkernels.evidence import rank  # noqa: F401
    from swkernels.studies import study  # noqa: F401

    replies = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(request, main)
        if request["after"] is not None:
            time.sleep(max(0.0, begin + request["after"] - time.monotonic()))
            os.kill(child, request["send"])  # it is a zombie at the least: the id is still its own
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(replies, (json.dumps([code, time.monotonic() - begin]) + "\n").encode())


def _become(request: dict, main) -> None:
    """Run the command in this process and end it."""
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
        if request["hook"]:
            name, *arguments = request["hook"]
            getattr(import_module("tests.faults.hooks"), name)(*arguments)
        if request["largest_file"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing says so: EFBIG
            limit = request["largest_file"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = main(request["arguments"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
