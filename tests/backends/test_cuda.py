"""The CUDA backend: what its kernels compute is tested on the CPU's threads (see
cuda_on_host/cuda_runtime.h), and on a GPU where there is one. test_cuda_resources.py has nvcc."""

from __future__ import annotations

import pytest
import torch

from swkernels.backends import cuda, native
from swkernels.backends.cuda.column_absmax import column_absmax, supports

from .oracle import expected_keys, special_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

needs_gpu = pytest.mark.skipif(cuda.available() is not None, reason=str(cuda.available()))


def random(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.fixture(scope="module")
def on_host(host_library):
    def run(x, keys=None, token_index=None, token_offset=0):
        keys = torch.zeros(x.shape[1], dtype=torch.int64) if keys is None else keys.clone()
        index = None if token_index is None else token_index.data_ptr()
        status = host_library.swk_cuda_column_absmax(
            x.data_ptr(), native.DTYPES[str(x.dtype)], *x.shape, x.stride(0), keys.data_ptr(),
            index, token_offset, None,
        )  # fmt: skip
        assert status == 0, status
        return keys

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logic(on_host, dtype):
    for tokens, channels in ((0, 9), (1, 1), (7, 63), (33, 256), (300, 130), (63, 1000)):
        x = random(tokens, channels, dtype=dtype)
        assert torch.equal(on_host(x), expected_keys(x)), (tokens, channels)
    padded = random(70, 272, dtype=dtype)
    for x in (padded[:, :264], padded[:, :100], padded[:, 8:20], padded[:, 1:200], padded[::3]):
        assert torch.equal(on_host(x), expected_keys(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logic_special_values_ties_and_running_keys(on_host, dtype):
    values = special_values(dtype)
    generator = torch.Generator().manual_seed(1)
    x = values[torch.randint(len(values), (90, 264), generator=generator)]
    assert torch.equal(on_host(x), expected_keys(x))
    x = torch.where(x.isnan(), torch.zeros((), dtype=dtype), x)
    keys = on_host(x[40:], None, None, 40)
    assert torch.equal(on_host(x[:40], keys), expected_keys(x))
    ones = torch.ones(100, 70, dtype=dtype)
    assert torch.equal(on_host(ones), expected_keys(ones))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logic_token_index(on_host, dtype):
    x = random(150, 70, dtype=dtype).round()
    generator = torch.Generator().manual_seed(2)
    for index in (torch.randperm(150, generator=generator) - 30, torch.full((150,), -1)):
        keys = on_host(x, None, index, 5)
        assert torch.equal(keys, expected_keys(x, None, index, 5))


def test_status(host_library):
    x, keys = torch.ones(2, 3), torch.zeros(3, dtype=torch.int64)

    address = x.data_ptr()

    def status(dtype=0, tokens=2, data=address, offset=0):
        arguments = (data, dtype, tokens, 3, 3, keys.data_ptr(), None, offset, None)
        return host_library.swk_cuda_column_absmax(*arguments)

    codes = [status(), status(dtype=3), status(tokens=-1), status(data=None)]
    assert codes == [0, 1, 3, 3]
    assert [status(offset=-1), status(offset=0xFFFFFFFE), status(tokens=0)] == [4, 4, 0]


def test_a_launch_that_fails_is_named(host_library, on_host, monkeypatch):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    host_library.fail_next_launch()
    with pytest.raises(AssertionError, match="7"):
        on_host(torch.zeros(3, 300))
    with pytest.raises(RuntimeError) as caught:
        cuda.check(7, "column_absmax of [3, 300] torch.float32")
    assert str(caught.value) == (
        "column_absmax of [3, 300] torch.float32 on CUDA: "
        "column_absmax<<<(3, 1, 1), (32, 8, 1)>>>: invalid configuration argument "
        "(cudaErrorInvalidConfiguration)"
    )
    with pytest.raises(RuntimeError, match="token index"):
        cuda.check(4, "column_absmax")
    cuda.check(0, "column_absmax")


def test_supports():
    assert "got cpu" in supports(torch.zeros(3, 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_available_says_what_is_missing():
    assert cuda.available() in (
        "PyTorch sees no CUDA GPU",
        "PyTorch is built for ROCm; CUDA C++ needs an NVIDIA GPU",
    )


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype):
    for tokens, channels in ((0, 5), (1, 1), (63, 1000), (5000, 2048), (70_000, 40)):
        x = random(tokens, channels, dtype=dtype)
        index = torch.randperm(tokens) - tokens // 4
        for token_index in (None, index):
            keys = torch.zeros(channels, dtype=torch.int64, device="cuda")
            on_device = None if token_index is None else token_index.cuda()
            column_absmax(x.cuda(), keys, on_device, 7)
            assert torch.equal(keys.cpu(), expected_keys(x, None, token_index, 7))
