"""Ctrl-C at every point where it can come."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

# Where CPython 3.11 and later looks for Ctrl-C: when a function begins, after a call, and when a
# loop goes round.
_LOOKS = ("RESUME", "CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD")


def interrupted(run: Callable, at: int, modules: Iterable[ModuleType]) -> int:
    """Run with a KeyboardInterrupt at look ``at`` in these modules; return how many there were."""
    looks, files = 0, {module.__file__ for module in modules}

    def trace(frame, event, argument):
        nonlocal looks
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            operation = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if operation.startswith(_LOOKS):
                looks += 1
                if looks == at:
                    raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return looks
