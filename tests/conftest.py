"""Shared set-up: Triton's interpreter where there is no GPU, poisoned allocations, real input."""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available():
    # Read when triton is first imported: its kernels then run on the CPU, for these tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402

# "with torch.device(...)" looks up what it acts on once: before the fixture below replaces some.
_device_constructors()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_PACKAGE = "swkernels"


def pytest_addoption(parser):
    parser.addoption(
        "--long",
        action="store_true",
        help="also run the tests marked long: many kills, bit flips and mutations (minutes each)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; runs with --long alone")


def pytest_collection_modifyitems(config, items):
    """Without --long those tests are deselected: a skip would stand for something missing here."""
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Fill what the package allocates without a value: NaN, and 0xA5 bytes for integers.

    An output that a kernel leaves partly unwritten then fails every comparison.
    """
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoning(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """A test that leaves gradients off breaks those that train after it, in other files."""
    yield
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert enabled, "the test left gradients off"


def _poisoning(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith(_PACKAGE) or tensor.is_meta or torch.compiler.is_compiling():
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        if tensor.dtype != torch.bool:
            tensor.view(torch.uint8).fill_(0xA5)
        return tensor

    return allocate_poisoned


@pytest.fixture(scope="session")
def smollm2_path():
    """The folder of the converted SmolLM2-135M-Instruct (see benchmarks.models.smollm2)."""
    from benchmarks.models import smollm2

    return smollm2.prepare()


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """(model, tokenizer): a real model with real super weights, float32, in eval mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(smollm2_path)
