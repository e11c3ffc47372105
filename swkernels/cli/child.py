"""``python -m swkernels.cli.child``: the command as a worker of a fleet starts it.

It ends with the process that started it, and tells errors that may pass by their exit code.
"""

from __future__ import annotations

import os
import signal
import sys

from swkernels.cli import main
from swkernels.errors import SwkernelsError
from swkernels.integrations.fleet.work import MAY_PASS

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError)
_CONNECTION = ("Connect", "Timeout")  # in the names of the errors of HTTP libraries


def may_pass(error: BaseException) -> bool:
    """Whether it may help to try again: a connection or a disk that failed, not a wrong input."""
    if not isinstance(error, SwkernelsError):
        return isinstance(error, OSError) and not isinstance(error, _LASTING)
    cause = error.__cause__ or error.__context__
    while cause is not None:
        if any(word in type(cause).__name__ for word in _CONNECTION):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _die_with_parent(parent: str | None) -> None:
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before this was set
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _die_with_parent(os.environ.pop("SWKERNELS_PARENT", None))
    # A worker may block or ignore Ctrl-C, which is how it lets this process clean up and go.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.exit(main(code_of=lambda error: MAY_PASS if may_pass(error) else None))
