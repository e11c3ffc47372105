"""``python -m swkernels`` is ``swkernels``."""

from __future__ import annotations

import sys

from swkernels.cli import main

sys.exit(main())
