"""Read mutants in a process of its own, whose memory and time are limited; a JSON line of figures.

    python -m tests.fuzz.run --count 100000 --seed 1

Each mutant follows from the seed, its kind and its number alone.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from swkernels.errors import InvalidInput

from . import subjects

SECONDS = 20  # of processor time, for a mutant; but for the pages none needs a hundredth of it
WAITING = 300  # seconds of the clock, busy as the machine may be
BYTES = 1 << 30  # of address space, beyond what the process has when it begins


class TooSlow(BaseException):
    """A mutant took longer than ``SECONDS``; no ``except Exception`` catches it."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=3000, help="mutants in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pages", type=int, default=4, help="accepted reports drawn as a page")
    parser.add_argument("--only", help="one kind alone")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    kinds = [kind for kind in subjects.ALL if options.only in (None, kind.__name__)]
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = [kind(Path(folder)) for kind in kinds]
        _limit_memory()
        signal.signal(signal.SIGPROF, _too_slow)
        signal.signal(signal.SIGALRM, _too_slow)
        for subject in made:
            subject.pages = options.pages
            found[type(subject).__name__] = _read_all(
                subject, -(-options.count // len(made)), options.seed
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"peak_mib": peak, "kinds": found}))
    return int(any(one["failures"] for one in found.values()))


def _read_all(subject, count: int, seed: int) -> dict:
    found = {"mutants": count, "accepted": 0, "refused": 0, "failures": []}
    for number in range(count):
        rng = random.Random(f"{seed}:{type(subject).__name__}:{number}")
        subject.path.write_bytes(subject.mutant(rng))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAITING)
        try:
            try:
                accepted = subject.read()
            except InvalidInput as error:
                message = str(error)
                assert message.isprintable() and len(message) < 2000, f"message {message!r:.300}"
                found["refused"] += 1
            else:
                found["accepted"] += 1
                subject.judge(accepted)
        except (Exception, TooSlow) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            found["failures"].append(f"{number}: {type(error).__name__} {error!s:.300} ({place})")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    return found


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _too_slow(*_) -> None:
    raise TooSlow(f"more than {SECONDS} s, or {WAITING} s of waiting")


if __name__ == "__main__":
    sys.exit(main())
