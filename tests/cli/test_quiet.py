"""What libraries say on import has no place in the output of a command."""

from __future__ import annotations

import subprocess
import sys


def test_libraries_are_quiet():
    code = "from swkernels.cli import main; main(['--version']); import bitsandbytes, peft"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("swkernels ")
