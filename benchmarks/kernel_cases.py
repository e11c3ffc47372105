"""One small case of each kernel, held against plain PyTorch: what compute-sanitizer watches.

    python -m benchmarks.kernel_cases [--kernel NAME ...]

It runs on the GPU, or without one in Triton's interpreter (TRITON_INTERPRET=1). A line for each
kernel says "ok", "wrong", "failed" or "skipped", and why. The exit status is 0, 1 where a kernel is
wrong or fails, or 77 where all were skipped.

``planted-error`` is no kernel of the package: it writes past the end of its output, to show that
the tool sees such an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from swkernels import ops
from swkernels.errors import BackendUnavailable

Check = Callable[[torch.device], None]  # raises where the kernel is wrong

SKIPPED = 77
PLANTED = "planted-error"

# Rows, columns (channels, or inputs of the weight), outputs of the weight. Odd ones leave every
# tile with an edge; those of descriptors start rows on 16 bytes.
_SIZES = {"cuda": ((1, 1, 1), (63, 301, 70), (300, 1040, 264)), "cpu": ((1, 1, 1), (33, 71, 20))}
_ALIGNED = {"cuda": ((1, 16, 8), (63, 304, 72), (300, 1040, 264)), "cpu": ((33, 72, 24),)}


class Wrong(Exception):
    """A kernel computed something else than the reference."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kernels that are named, or all, and print how each did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_cases")
    parser.add_argument("--kernel", action="append", choices=[*KERNELS, PLANTED])
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outcomes = []
    for name in options.kernel or KERNELS:
        outcome, reason = _outcome(planted_error if name == PLANTED else KERNELS[name], device)
        outcomes.append(outcome)
        print(f"{outcome} {name}{f': {reason}' if reason else ''}", flush=True)
    if {"wrong", "failed"} & set(outcomes):
        return 1
    return 0 if "ok" in outcomes else SKIPPED


def _outcome(check: Check, device: torch.device) -> tuple[str, str]:
    try:
        check(device)
    except Wrong as error:
        return "wrong", str(error)
    except BackendUnavailable as error:
        return "skipped", str(error)
    except Exception as error:  # the other kernels are still to run
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return "ok", ""


def column_absmax(backend: str) -> Check:
    def check(device: torch.device) -> None:
        for rows, columns, _ in _SIZES[device.type]:
            for dtype in (torch.float32, _half(device)):
                x = _numbers(rows, columns, dtype=dtype)
                for index in (None, _ragged(rows)):
                    keys = ops.column_absmax(
                        x.to(device),
                        token_mask=None if index is None else index.to(device),
                        token_offset=5,
                        backend=backend,
                    )
                    _same_keys(keys, x, index, 5, f"x {[rows, columns]} {dtype}")

    return check


def glu_absmax(device: torch.device) -> None:
    for rows, columns, _ in _SIZES[device.type]:
        for dtype in (torch.float32, _half(device)):
            pair = _numbers(rows, 2 * columns, dtype=dtype)  # gate and up side by side
            # relu: its product is exact in float64, so h is that product, rounded once.
            gate, up = pair.double().chunk(2, dim=1)
            h, keys = ops.glu_absmax(*pair.to(device).chunk(2, dim=1), "relu", backend="triton")
            _same(h, (gate.relu() * up).to(dtype), f"h {[rows, columns]} {dtype}")
            _same_keys(keys, h.cpu(), None, 0, f"h {[rows, columns]} {dtype}")


def linear_absmax(*, descriptors: bool) -> Check:
    def check(device: torch.device) -> None:
        from swkernels.backends.triton import linear_absmax as triton

        if descriptors and device.type == "cuda" and not triton._has_descriptors(device):
            raise BackendUnavailable("this GPU has no tensor memory accelerator")
        dtypes = (_half(device),) if descriptors else (torch.float32, _half(device))
        for rows, columns, outputs in (_ALIGNED if descriptors else _SIZES)[device.type]:
            for dtype in dtypes:
                shapes = (rows, columns), (outputs, columns), (outputs,)
                x, weight, bias = (_integers(*shape, dtype=dtype) for shape in shapes)
                in_keys, out_keys = (ops.empty_keys(n, device) for n in (columns, outputs))
                y = triton.fused_linear_absmax(
                    *(tensor.to(device) for tensor in (x, weight, bias)),
                    *(in_keys, out_keys, None, 3),
                    descriptors=descriptors,
                )
                # Sums of small integers are exact, so y is the exact sum, rounded once.
                exact = F.linear(x.double(), weight.double(), bias.double()).to(dtype)
                what = f"{[rows, columns, outputs]} {dtype}"
                _same(y, exact, f"y {what}")
                _same_keys(in_keys, x, None, 3, f"x {what}")
                _same_keys(out_keys, y.cpu(), None, 3, f"y {what}")

    return check


def sampled_grad(device: torch.device) -> None:
    for tokens, columns, outputs in _SIZES[device.type]:
        for dtype in (torch.float32, _half(device)):
            dy, x = (_integers(tokens, size, dtype=dtype) for size in (outputs, columns))
            rows, cols = _coordinates(outputs, columns)
            given = (tensor.to(device) for tensor in (dy, x, rows, cols))
            values = ops.sampled_grad(*given, backend="triton")
            exact = (dy.double().T @ x.double())[rows, cols].float()
            _same(values, exact, f"dW {[tokens, columns, outputs]} {dtype}")


def sparse_linear(device: torch.device) -> None:
    for tokens, columns, outputs in _SIZES[device.type]:
        for dtype in (torch.float32, _half(device)):
            x, y = (_integers(tokens, size, dtype=dtype) for size in (columns, outputs))
            rows, cols = _coordinates(outputs, columns)
            values = _integers(len(rows), dtype=torch.float32)
            given = (tensor.to(device) for tensor in (x, y, values, rows, cols))
            found = ops.sparse_linear(*given, backend="triton")
            deltas = torch.zeros(outputs, columns, dtype=torch.float64)
            deltas[rows, cols] = values.double()
            exact = (y.double() + x.double() @ deltas.T).to(dtype)
            _same(found, exact, f"y {[tokens, columns, outputs]} {dtype}")


def masked_grad(device: torch.device) -> None:
    for _, columns, outputs in _SIZES[device.type]:
        for dtype in (torch.float32, _half(device)):
            grad = _integers(outputs, columns, dtype=dtype)
            rows, cols = _coordinates(outputs, columns)
            for scale in (0.0, 0.5):
                given = (tensor.to(device) for tensor in (grad.clone(), rows, cols))
                found = ops.masked_grad_(*given, scale, backend="triton")
                exact = grad.clone()
                exact[rows, cols] *= scale
                _same(found, exact, f"grad {[outputs, columns]} {dtype} times {scale}")


def lora_product(name: str) -> Check:
    """One of the three products of LoRA, masked and with a dropout of a half."""

    def check(device: torch.device) -> None:
        from swkernels.backends import philox
        from swkernels.backends.triton.lora_linear import lora_linear as products

        seed = torch.tensor(7)
        for tokens, columns, r in _SIZES[device.type]:
            for dtype in (torch.float32, _half(device)):
                r = min(r, 24)
                x = _integers(tokens, columns, dtype=dtype)
                P = _integers(r, columns, dtype=torch.float32)
                S, scale = _integers(tokens, r, dtype=dtype), torch.ones(columns)
                scale[::3] = 0.5
                dropped = philox.factors(0, tokens, columns, 0.5, seed).double()
                masked = P.double() * scale
                rest = (scale.to(device), 0.5, seed.to(device))
                on_device = [tensor.to(device) for tensor in (x, S, P)]
                if name == "project":
                    found = products.project(on_device[0], on_device[2], *rest)
                    exact = ((x.double() * dropped) @ masked.T).to(dtype)
                elif name == "expand":
                    found = on_device[0].clone()
                    products.expand(found, *on_device[1:], *rest, add=True)
                    exact = (x.double() + (S.double() @ masked) * dropped).to(dtype)
                else:
                    found = products.reduce(on_device[0], on_device[1], *rest)
                    exact = ((S.double().T @ (x.double() * dropped)) * scale).float()
                _same(found, exact, f"{name} {[tokens, columns, r]} {dtype}")

    return check


def topk_low_rank(device: torch.device) -> None:
    for rows, columns, r in _SIZES[device.type]:
        for dtype in (torch.float32, _half(device)):
            factors = [(_integers(rows, r, dtype=dtype), _integers(r, columns, dtype=dtype))]
            on_device = [(B.to(device), A.to(device)) for B, A in factors]
            k = min(100, rows * columns)  # many entries are equal
            found = ops.topk_low_rank(on_device, k, backend="triton")
            exact = ops.topk_low_rank(factors, k, backend="reference")
            for name, ours, theirs in zip(found._fields, found, exact):
                _same(ours, theirs, f"{name} {[rows, columns, r]} {dtype}")


def topk_abs(device: torch.device) -> None:
    for rows, columns, _ in _SIZES[device.type]:
        for dtype in (torch.float32, _half(device), torch.float8_e4m3fn):
            tensors = [_numbers(rows, columns, dtype=dtype), _numbers(columns, rows, dtype=dtype)]
            on_device = [tensor.to(device) for tensor in tensors]
            k = min(100, rows * columns)
            found = ops.topk_abs(on_device, k, backend="cuda")
            exact = ops.topk_abs(tensors, k, backend="reference")
            for name, ours, theirs in zip(found._fields, found, exact):
                _same(ours, theirs, f"{name} {[rows, columns]} {dtype}")


def block_quantize(name: str) -> Check:
    """The kernel for all in one pass, or those of several passes."""

    def check(device: torch.device) -> None:
        for kind in _PACKED[:1] if name == "fused" else _PACKED[1:]:
            for columns, outputs in _packed_sizes(device):
                w = _numbers(outputs, columns, dtype=_half(device))
                found = ops.block_quantize(w.to(device), **kind, backend="triton").tensors()
                exact = ops.block_quantize(w, **kind, backend="reference").tensors()
                for part, tensor in exact.items():
                    _same(found[part], tensor, f"{part} of {[outputs, columns]} {kind}")

    return check


def block_dequantize(device: torch.device) -> None:
    for kind in _PACKED:
        for columns, outputs in _packed_sizes(device):
            w = _numbers(outputs, columns, dtype=_half(device))
            q = ops.block_quantize(w, **kind, backend="reference")
            found = ops.block_dequantize(q.to(device), backend="triton")
            exact = ops.block_dequantize(q, backend="reference")
            _same(found, exact, f"{[outputs, columns]} {kind}")


def quant_linear(variant: str) -> Check:
    """Tokens with a single 1 read the weight; one token for "vector", more for "dot"."""

    def check(device: torch.device) -> None:
        tokens, dtype = {"vector": 1, "dot": 20}[variant], _half(device)
        for kind in _PACKED:
            for columns, outputs in _packed_sizes(device):
                w = _numbers(outputs, columns, dtype=dtype)
                q = ops.block_quantize(w, **kind, backend="reference")
                some = torch.arange(tokens) * 7 % columns
                x = F.one_hot(some, columns).to(device, dtype)
                found = ops.quant_linear(x, q.to(device), backend="triton")
                exact = ops.block_dequantize(q, dtype, backend="reference")[:, some].T
                _same(found, exact, f"{variant} {[outputs, columns]} {kind}")

    return check


def _packed_sizes(device: torch.device) -> tuple[tuple[int, int], ...]:
    """Columns and outputs: rows of whole runs, and rows that cut them."""
    return ((1024, 264), (301, 70)) if device.type == "cuda" else ((96, 20), (71, 9))


_PACKED: tuple[dict, ...] = (
    {"code": "int4", "block_size": 64, "largest": 5},
    {"code": "nf4", "block_size": (2, 32), "largest": 5, "scale_dtype": "float16"},
    {"code": "int8", "symmetric": False, "block_size": "tensor", "clip": ops.Clip("zscore", 2.0)},
)


def planted_error(device: torch.device) -> None:
    """Write past the end of an allocation, as a kernel does whose mask is wrong by one."""
    if device.type != "cuda":
        raise BackendUnavailable("without a GPU it would write into this process's own memory")
    from benchmarks.gpu.planted import error_kernel

    y = torch.zeros(1024, device=device)
    error_kernel[(1,)](y, y.numel(), BLOCK=2048)
    torch.cuda.synchronize(device)


KERNELS = {
    "triton-column_absmax": column_absmax("triton"),
    "triton-glu_absmax": glu_absmax,
    "triton-linear_absmax-pointers": linear_absmax(descriptors=False),
    "triton-linear_absmax-descriptors": linear_absmax(descriptors=True),
    "triton-sampled_grad": sampled_grad,
    "triton-sparse_linear": sparse_linear,
    "triton-masked_grad": masked_grad,
    "triton-lora_linear-project": lora_product("project"),
    "triton-lora_linear-expand": lora_product("expand"),
    "triton-lora_linear-reduce": lora_product("reduce"),
    "triton-topk_low_rank": topk_low_rank,
    "triton-block_quantize-fused": block_quantize("fused"),
    "triton-block_quantize-ranges": block_quantize("ranges"),
    "triton-block_quantize-sums": block_quantize("sums"),
    "triton-block_quantize-encode": block_quantize("encode"),
    "triton-block_dequantize": block_dequantize,
    "triton-quant_linear-vector": quant_linear("vector"),
    "triton-quant_linear-dot": quant_linear("dot"),
    "cuda-column_absmax": column_absmax("cuda"),
    "cuda-topk_abs-count": topk_abs,  # one case for both: only that kernel is watched
    "cuda-topk_abs-gather": topk_abs,
}


def _half(device: torch.device) -> torch.dtype:
    """The 16-bit type to test: Triton's interpreter cannot multiply bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def _coordinates(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A third of the coordinates of a weight, in no order."""
    generator = torch.Generator().manual_seed(rows)
    flat = torch.randperm(rows * columns, generator=generator)[: -(-rows * columns // 3)]
    return flat // columns, flat % columns


def _ragged(rows: int) -> torch.Tensor:
    """Token indices in no order, a quarter of the rows left out."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(rows)) - rows // 4


def _numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


def _integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def _same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    differ = int((found.cpu() != expected).sum())
    if differ:
        raise Wrong(f"{differ} of {expected.numel()} elements of {what} differ")


def _same_keys(keys, values, index, offset: int, what: str) -> None:
    expected = ops.column_absmax(values, token_mask=index, token_offset=offset, backend="reference")
    _same(keys, expected, f"the peaks of {what}")


if __name__ == "__main__":
    sys.exit(main())
