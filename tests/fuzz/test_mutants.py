"""Mutated files of every kind: refused in one line, or accepted and found sound by another reader.

No crash, no other exception, no mutant that takes long, no memory beyond a limit: they are read in
a process of their own. docs/untrusted-files.md has the figures of 100,000.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from swkernels.errors import InvalidInput

from . import run, subjects
from .mutate import mutate_bytes, mutate_json

ROOT = Path(__file__).parents[2]


def figures(count: int, seed: int, pages: int) -> dict:
    """Run ``tests.fuzz.run``; its figures, after a check that nothing failed."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--count", str(count)]
    command += ["--seed", str(seed), "--pages", str(pages)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    failures = {kind: one["failures"][:5] for kind, one in found["kinds"].items()}
    assert not any(failures.values()), failures
    assert done.returncode == 0
    return found["kinds"]


def check(kinds: dict, count: int) -> None:
    assert sum(one["mutants"] for one in kinds.values()) >= count
    for kind, one in kinds.items():
        assert one["accepted"] + one["refused"] == one["mutants"], kind
        # Both happen: a reader that refuses everything would pass the rest.
        assert one["accepted"] and one["refused"], kind


def test_three_thousand_mutants():
    check(figures(3000, seed=1, pages=2), 3000)


@pytest.mark.long
def test_a_hundred_thousand_mutants():
    check(figures(100_000, seed=2, pages=200), 100_000)


def test_mutants_follow_from_the_seed_and_differ():
    document = {"a": [1, 2.5, "text", None, {"b": True}], "c": "d"}
    text = json.dumps(document).encode()

    def made(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [mutate_json(rng, document, document) for _ in range(200)] + [
            mutate_bytes(rng, text, text) for _ in range(200)
        ]

    assert made(1) == made(1) != made(2)
    assert len(set(made(1))) > 250 and document == json.loads(text)


@pytest.mark.parametrize("fault", ["accepts", "raises", "hangs", "eats memory", "message"])
def test_the_run_notices(fault, tmp_path, monkeypatch):
    """A reader with a fault of each kind that the run is there for."""

    def read(self):
        if fault == "accepts":
            return subjects.load_header(self.folder / "intact.safetensors")
        if fault == "raises":
            raise KeyError("dtype")
        if fault == "hangs":
            while True:
                pass
        if fault == "eats memory":
            raise MemoryError
        raise InvalidInput("a whole file in a message " * 100)

    subject = subjects.Header(tmp_path)
    (subject.folder / "intact.safetensors").write_bytes(subject.original)
    monkeypatch.setattr(subjects.Header, "read", read)
    monkeypatch.setattr(run, "SECONDS", 0.05)
    before = run.signal.signal(run.signal.SIGPROF, run._too_slow)
    try:
        found = run._read_all(subject, 10, 1)
    finally:
        run.signal.signal(run.signal.SIGPROF, before)
    expected = {"accepts": 1, "raises": 10, "hangs": 10, "eats memory": 10, "message": 10}[fault]
    assert len(found["failures"]) >= expected
