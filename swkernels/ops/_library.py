"""The torch.library namespace ``swkernels``."""

from __future__ import annotations

import torch

library = torch.library.Library("swkernels", "DEF")
