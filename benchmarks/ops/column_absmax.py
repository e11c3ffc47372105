"""``column_absmax`` against PyTorch and against the memory: 8192 x 2048, two threads or more.

    python -m benchmarks.ops.column_absmax [--dtype float32] [--rounds 15]

Buffers rotate, so that every run reads from memory and not from the cache. The read bandwidth is
measured in the same run, by the fastest plain read that PyTorch has: the sum of the buffer seen
as int64.
"""

from __future__ import annotations

import argparse
from itertools import cycle

import torch

from benchmarks.timing import interleaved
from swkernels import ops

BUFFERS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--channels", type=int, default=2048)
    options = parser.parse_args()
    shape = options.tokens, options.channels
    dtype = getattr(torch, options.dtype)
    buffers = [torch.randn(shape).to(dtype) for _ in range(BUFFERS)]
    running = ops.column_absmax(buffers[0])

    def over_buffers(function):
        turn = cycle(buffers)
        return lambda: function(next(turn))

    medians = interleaved(
        {
            "read (sum of int64)": over_buffers(lambda x: x.view(torch.int64).sum()),
            "column_absmax": over_buffers(ops.column_absmax),
            "column_absmax, running keys": over_buffers(lambda x: ops.column_absmax(x, running)),
            "abs().amax(0)": over_buffers(lambda x: x.abs().amax(0)),
            "abs().max(0)": over_buffers(lambda x: x.abs().max(0)),
        },
        options.rounds,
    )
    size = buffers[0].numel() * buffers[0].element_size()
    read = medians["read (sum of int64)"]
    print(f"{shape[0]} x {shape[1]} {options.dtype}, {size / 1e6:.0f} MB")
    print(f"{torch.get_num_threads()} threads, medians of {options.rounds} interleaved runs")
    for name, seconds in medians.items():
        rate = size / seconds / 1e9
        print(f"{name:30s} {seconds * 1e3:8.2f} ms {rate:7.1f} GB/s {read / seconds:6.2f} of read")


if __name__ == "__main__":
    main()
