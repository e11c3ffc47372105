"""What the steps of a run share: where things go, what the machine is, how a child is started."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import records
from benchmarks.gpu.jobs import Finished, Job

ROOT = Path(__file__).parents[2]

# Whatever else is set in the caller's environment would decide what is tested or measured.
_OURS = ("TRITON_INTERPRET", "SWKERNELS_BACKEND", "SWKERNELS_CPU_ISA", "SWKERNELS_TUNING")


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        status: "ok", "failed", "timed out", "skipped", "interrupted" or "not run".
        note: one line, why or what came out.
        parts: where a step has parts, how each of them ended.
    """

    status: str
    note: str = ""
    parts: dict[str, str] = field(default_factory=dict)


@dataclass
class Context:
    """One run.

    Attributes:
        out: the folder that takes everything.
        dry: tiny sizes in Triton's interpreter, without a GPU.
        about: what the step ``environment`` found; empty before.
    """

    out: Path
    dry: bool
    about: dict = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    @property
    def gpu(self) -> dict:
        """The first GPU; empty where there is none."""
        return next(iter(self.about.get("gpus", [])), {})

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def _name(self) -> str:
        return self.gpu.get("name") or ("interpreter" if self.dry else "unknown-gpu")

    @property
    def tuning(self) -> Path:
        """The tuning file; its folder is the only one that the children read."""
        slug = re.sub(r"[^a-z0-9]+", "-", self._name.lower()).strip("-")
        return self.out / "tuning" / f"{slug}.json"

    @property
    def record(self) -> Path:
        return records.default_path(self._name, self.about.get("commit"), self.out / "results")

    def job(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
    ) -> Job:
        """A child process; a command that begins with "-" is one of this Python."""
        command = [sys.executable, *command] if command[0].startswith("-") else list(command)
        environment = self.environment | (environment or {})
        return Job(name, command, self.logs / f"{name}.log", environment, folder)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of children."""
        variables = {name: value for name, value in os.environ.items() if name not in _OURS}
        # CUDA's tools are often installed and not on PATH.
        cuda = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
        tools = [os.path.join(folder, "bin") for folder in cuda if folder]
        path = [variables.get("PATH", os.defpath), *tools]
        python_path = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
        variables |= {
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join(python_path),
            "PYTHONUNBUFFERED": "1",  # what a child that is ended has said is then in its log
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "SWKERNELS_TUNING": str(self.out / "tuning"),
        }
        if self.dry:
            variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        return variables

    def tool(self, name: str) -> str | None:
        """Where a program lies, for the children; None where it is missing."""
        return shutil.which(name, path=self.environment["PATH"])


def outcome_of(finished: Finished, note: str = "") -> Outcome:
    """The outcome of a step of one job; what it said last is why it failed."""
    if finished.code is None:
        return Outcome("timed out", f"ended after {finished.seconds:.0f} s")
    if finished.code:
        return Outcome("failed", f"exit status {finished.code}: {finished.last_line}")
    return Outcome("ok", note)
