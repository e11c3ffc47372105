from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from swkernels import ops
from swkernels.errors import BackendUnavailable, InvalidInput

from .backends_here import DEVICE, DTYPES, runnable
from .listed import Allocations, normal

BACKENDS = runnable("lora_linear")
MASKS = ("none", "rows", "columns", "positions", "all")
SCALES = (0.0, 0.1, 0.2, 0.5, 0.8, 1.0)
SEED = 11

# NumPy warns where Triton's interpreter computes with infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def mask_of(kind, D, H, scale=0.2, count=12):
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(3)
    pairs = [torch.randint(0, size, (count,), generator=generator) for size in (D, H)]
    kinds = ("rows", "columns", "positions") if kind == "all" else (kind,)
    coordinates = torch.stack(pairs, 1).to(DEVICE)
    return ops.LoraMask.of(coordinates, (D, H), scale, **dict.fromkeys(kinds, True))


def philox(counter: int, seed: int) -> list[int]:
    """Four words of Philox4x32-10 by its definition, one counter at a time."""
    word = 2**32 - 1
    c, key = [counter & word, counter >> 32, 0, 0], [seed & word, seed >> 32]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ key[0], second & word, first >> 32 ^ c[3] ^ key[1], first & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return c


def kept(tokens, H, dropout, seed=SEED):
    """What dropout multiplies x [tokens, H] by, in float64."""
    groups = -(-H // 4)
    words = [philox(counter, seed) for counter in range(tokens * groups)]
    words = torch.tensor(words, dtype=torch.float64, device=DEVICE).reshape(tokens, groups * 4)
    factor = float(torch.tensor(1 / (1 - dropout), dtype=torch.float32))
    return (words[:, :H] >= dropout * 2**32).double() * factor


def expected(x, base_out, A, B, scaling, mask, dropout=0.0):
    """base_out + dropout(x) dW^T with dense matrices, in the dtype of the arguments."""
    if dropout:
        x = x * kept(x.numel() // x.shape[-1], x.shape[-1], dropout).view(x.shape).to(x.dtype)
    if mask is not None and mask.row_scale is not None:
        B = B * mask.row_scale[:, None].to(B.dtype)
    if mask is not None and mask.column_scale is not None:
        A = A * mask.column_scale.to(A.dtype)
    dW = (scaling * B @ A).to(x.dtype)
    if mask is not None and mask.pattern is not None:
        M = torch.ones_like(dW)
        M[mask.pattern.rows.long(), mask.pattern.cols.long()] = mask.scale
        dW = dW * M
        if mask.kept is not None:
            kept_there = torch.zeros_like(dW)
            at = mask.pattern.rows.long(), mask.pattern.cols.long()
            kept_there[at] = mask.kept.to(dW.dtype)
            dW = dW + kept_there
    return base_out + (x @ dW.T).to(base_out.dtype)


def arguments(tokens=(2, 9), D=37, H=45, r=8, dtype=torch.float32, factors=torch.float32):
    return {
        "x": normal(*tokens, H, dtype=dtype),
        "base_out": normal(*tokens, D, dtype=dtype, seed=1),
        "A": normal(r, H, dtype=factors, seed=2),
        "B": normal(D, r, dtype=factors, seed=3),
    }


def with_grads(function, given, dy):
    """The result and the gradients of x, base_out, A and B."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    y = function(**leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves.values())]


def through_op(mask=None, dropout=0.0, scaling=2.0, backend=None):
    return lambda **given: ops.lora_linear(
        **given, scaling=scaling, mask=mask, dropout=dropout, seed=SEED, backend=backend
    )


def by_formula(mask=None, dropout=0.0, scaling=2.0):
    return lambda **given: expected(**given, scaling=scaling, mask=mask, dropout=dropout)


def error(found, exact):
    return float((found.double() - exact).abs().max())


@pytest.mark.parametrize("dropout", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_dense_formula(backend, kind, dropout):
    dtype = torch.float64 if backend == "reference" else torch.float32
    given, mask = arguments(dtype=dtype, factors=dtype), mask_of(kind, 37, 45)
    dy = normal(2, 9, 37, seed=4)
    found = with_grads(through_op(mask, dropout, 2.0, backend), given, dy)
    wide = {name: tensor.double() for name, tensor in given.items()}
    exact = with_grads(by_formula(mask, dropout, 2.0), wide, dy.double())
    if dtype == torch.float64:
        for ours, theirs in zip(found, exact):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        return
    plain = with_grads(by_formula(mask, dropout, 2.0), given, dy)
    for ours, theirs, truth in zip(found, plain, exact):
        assert error(ours, truth) <= max(2 * error(theirs, truth), 1e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_within_twice_pytorchs_error(backend, kind, dtype):
    """Factors in float32, computed in the activation's dtype."""
    if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot multiply bfloat16")
    given, mask = arguments((200,), dtype=dtype), mask_of(kind, 37, 45)
    dy = normal(200, 37, dtype=dtype, seed=4)
    found = with_grads(through_op(mask, 0.0, 2.0, backend), given, dy)
    wide = {name: tensor.double() for name, tensor in given.items()}
    exact = with_grads(by_formula(mask, 0.0, 2.0), wide, dy.double())

    def in_dtype(x, base_out, A, B):  # as PyTorch computes it with factors in that dtype
        return expected(x, base_out, A.to(dtype), B.to(dtype), 2.0, mask)

    plain = with_grads(in_dtype, given, dy)
    for ours, theirs, truth in zip(found, plain, exact):
        assert error(ours, truth) <= 2 * error(theirs, truth)
    assert found[0].dtype == dtype and found[3].dtype == found[4].dtype == torch.float32


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", MASKS[1:])
def test_every_scale(kind, scale):
    given = arguments(dtype=torch.float64, factors=torch.float64)
    mask, dy = mask_of(kind, 37, 45, scale), normal(2, 9, 37, dtype=torch.float64, seed=4)
    found = with_grads(through_op(mask, 0.3, 0.5), given, dy)
    exact = with_grads(by_formula(mask, 0.3, 0.5), given, dy)
    for ours, theirs in zip(found, exact):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MASKS[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_one_is_bit_equal_to_no_mask(backend, kind):
    given, dy = arguments(), normal(2, 9, 37, seed=4)

    def run(mask):
        return with_grads(through_op(mask, 0.3, 2.0, backend), given, dy)

    for ours, bare in zip(run(mask_of(kind, 37, 45, 1.0)), run(None)):
        assert torch.equal(ours, bare)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_and_columns_get_exactly_no_gradient(backend):
    given, mask = arguments(), mask_of("all", 37, 45, 0.0)
    grads = with_grads(through_op(mask, 0.0, 2.0, backend), given, normal(2, 9, 37, seed=4))
    rows, columns = mask.row_scale == 0, mask.column_scale == 0
    assert (grads[4][rows] == 0).all() and (grads[3][:, columns] == 0).all()
    assert (grads[4][~rows] != 0).any() and (grads[3][:, ~columns] != 0).any()


def test_kept_positions_stay_what_they_are():
    given, mask = (
        arguments(dtype=torch.float64, factors=torch.float64),
        mask_of("positions", 37, 45, 0.0),
    )
    mask = ops.LoraMask(pattern=mask.pattern, kept=normal(len(mask.pattern), seed=8))
    eye = torch.eye(45, dtype=torch.float64, device=DEVICE)
    nothing = torch.zeros(45, 37, dtype=torch.float64, device=DEVICE)
    dW = ops.lora_linear(eye, nothing, given["A"], given["B"], 2.0, mask).T
    at = mask.pattern.rows.long(), mask.pattern.cols.long()
    torch.testing.assert_close(dW[at], mask.kept.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_that_of_the_seed(backend):
    """Word for word Philox, on every backend."""
    for H, dropout, seed in itertools.product((1, 3, 45, 130), (0.1, 0.5, 0.9), (0, 2**62 + 12345)):
        x, nothing = torch.ones(13, H, device=DEVICE), torch.zeros(13, 1, device=DEVICE)
        A, B = torch.ones(1, H, device=DEVICE), torch.ones(1, 1, device=DEVICE)
        y = ops.lora_linear(x, nothing, A, B, 1.0, None, dropout, seed, backend=backend)
        counted = kept(13, H, dropout, seed).sum(1)
        torch.testing.assert_close(y.double()[:, 0], counted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("start", [0, 5, 2**31 + 7])
def test_cpu_dropout_equals_its_definition(start):
    from swkernels.backends import philox as definition
    from swkernels.backends.cpu import lora_linear as cpu

    for N, dropout in itertools.product((1, 4, 127, 128, 129, 700), (0.0001, 0.5, 0.999)):
        seed = torch.tensor(2**60 + 17)
        ours = cpu.factors(start, start + 9, N, dropout, seed)
        assert torch.equal(ours, definition.factors(start, start + 9, N, dropout, seed))


def test_dropout_rate_and_seeds():
    x, zero = torch.ones(512, 256, device=DEVICE), torch.zeros(512, 256, device=DEVICE)
    eye = torch.eye(256, device=DEVICE)

    def dropped(seed):
        return ops.lora_linear(x, zero, eye, eye, 1.0, None, 0.25, seed) == 0

    first = dropped(1)
    assert torch.equal(first, dropped(1)) and not torch.equal(first, dropped(2))
    assert abs(float(first.float().mean()) - 0.25) < 0.005
    assert not torch.equal(dropped(None), dropped(None))
    torch.manual_seed(5)
    drawn = dropped(None)
    torch.manual_seed(5)
    assert torch.equal(drawn, dropped(None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_layers_of_one_input(backend):
    """q, k and v together are q, k and v alone."""
    given = [arguments(D=D) for D in (37, 12, 20)]
    masks = [
        mask_of(kind, len(g["B"]), 45) for kind, g in zip(("columns", "none", "positions"), given)
    ]
    x = given[0]["x"].clone().requires_grad_()
    parts = [[g[name].clone().requires_grad_() for name in ("base_out", "A", "B")] for g in given]
    outs, As, Bs = zip(*parts)
    together = ops.lora_linears(x, outs, As, Bs, [2.0, 1.0, 0.5], masks, backend=backend)
    torch.cat([y.square() for y in together], -1).sum().backward()
    others = given[0]["x"].clone().requires_grad_()
    total = 0
    for g, mask, scaling, y, own in zip(given, masks, (2.0, 1.0, 0.5), together, parts):
        alone = [g[name].clone().requires_grad_() for name in ("base_out", "A", "B")]
        single = ops.lora_linear(others, *alone, scaling, mask, backend=backend)
        torch.testing.assert_close(single, y)
        total = total + single.square().sum()
        total.backward()
        total = 0
        for leaf, same in zip(own, alone):
            assert_same_sums(leaf.grad, same.grad)
    assert_same_sums(x.grad, others.grad)


def assert_same_sums(ours, theirs):
    """Equal but for the order of float32 sums, whose terms may cancel: as a share of the whole."""
    assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize("kind", MASKS)
def test_saves_the_input_and_little_more(kind):
    given = {n: t.requires_grad_() for n, t in arguments((512,), D=64, H=512).items()}
    mask, saved = mask_of(kind, 64, 512), {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = ops.lora_linear(**given, scaling=2.0, mask=mask, dropout=0.3)
    parameters = {given[name].untyped_storage()._cdata for name in ("A", "B")}
    size = sum(t.numel() for key, t in saved.items() if key not in parameters and t.dim() > 1)
    assert size <= 1.1 * given["x"].numel()
    y.sum().backward()


def test_no_matrix_of_the_weights_size_is_made():
    given = {n: t.requires_grad_() for n, t in arguments((64,), D=600, H=700).items()}
    with Allocations() as made:
        ops.lora_linear(**given, scaling=2.0, mask=mask_of("all", 600, 700)).sum().backward()
    assert max(made.sizes) < 600 * 700 // 4
    with Allocations() as made:
        (given["B"] @ given["A"]).sum()
    assert max(made.sizes) >= 600 * 700


@pytest.mark.parametrize("tokens", [0, 1, 63, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(backend, tokens):
    if backend == "triton" and DEVICE == "cpu" and tokens == 1000:
        tokens = 130  # the interpreter is slow
    for r, D, H in ((1, 1, 1), (3, 17, 5), (20, 33, 64)):
        given, dy = arguments((tokens,), D, H, r), normal(tokens, D, seed=4)
        mask = mask_of("all", D, H, 0.5, count=1)
        found = with_grads(through_op(mask, 0.3, 2.0, backend), given, dy)
        wide = {name: tensor.double() for name, tensor in given.items()}
        exact = with_grads(by_formula(mask, 0.3, 2.0), wide, dy.double())
        for ours, truth in zip(found, exact):
            assert not truth.numel() or error(ours, truth) <= 1e-5 * float(truth.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_arguments_and_in_place(backend):
    x = normal(9, 90)[:, ::2]
    base_out = normal(37, 9, seed=1).T
    A, B = normal(45, 8, seed=2).T, normal(8, 37, seed=3).T
    want = expected(x.double(), base_out.double(), A.double(), B.double(), 2.0, None)
    y = ops.lora_linear(x, base_out, A, B, 2.0, backend=backend)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    before = base_out.clone()
    assert not torch.equal(y, before) and torch.equal(base_out, before)
    version = base_out._version
    assert ops.lora_linear(x, base_out, A, B, 2.0, inplace=True, backend=backend) is base_out
    assert torch.equal(base_out, y) and base_out._version > version


def test_in_place_on_what_a_layer_returns():
    given, weight = arguments(), normal(37, 45, seed=7).requires_grad_()
    x = given["x"].requires_grad_()
    grads = []
    for inplace in (False, True):
        base_out = F.linear(x, weight)
        y = ops.lora_linear(x, base_out, given["A"], given["B"], 2.0, inplace=inplace)
        grads.append(torch.autograd.grad(y.square().sum(), (x, weight)))
        assert (y is base_out) == inplace
    for first, second in zip(*grads):
        assert torch.equal(first, second)
    with pytest.raises(InvalidInput, match="leaf"):
        leaf = given["base_out"].requires_grad_()
        ops.lora_linear(x, leaf, given["A"], given["B"], 2.0, inplace=True)


def test_mixed_dtypes():
    """Under autocast the base's output is narrower than x."""
    given = arguments()
    y = ops.lora_linear(**given | {"base_out": given["base_out"].bfloat16()}, scaling=2.0)
    assert y.dtype == torch.bfloat16
    exact = expected(**{n: t.double() for n, t in given.items()}, scaling=2.0, mask=None)
    narrow = expected(**{n: t.bfloat16() for n, t in given.items()}, scaling=2.0, mask=None)
    assert error(y, exact) <= 2 * error(narrow, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_and_nan_pass(backend):
    given = arguments((3,))
    given["x"][1, 2] = torch.inf
    given["x"][2, 2] = torch.nan
    y = ops.lora_linear(**given, scaling=2.0, backend=backend)
    assert y[0].isfinite().all() and not y[1].isfinite().any() and y[2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same(backend):
    given = arguments((300,) if DEVICE == "cuda" or backend != "triton" else (70,))
    dy = normal(*given["base_out"].shape, seed=4)

    def run():
        return with_grads(
            lambda x, base_out, A, B: ops.lora_linear(
                x, base_out, A, B, 2.0, mask_of("all", 37, 45), 0.3, SEED, backend=backend
            ),
            given, dy,
        )  # fmt: skip

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_gradcheck():
    given = arguments((3,), D=4, H=5, r=2, dtype=torch.float64, factors=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in given.values()]
    for kind, dropout in itertools.product(MASKS, (0.0, 0.4)):
        mask = mask_of(kind, 4, 5, 0.5, count=4)
        assert torch.autograd.gradcheck(
            partial(ops.lora_linear, scaling=2.0, mask=mask, dropout=dropout, seed=SEED), leaves
        )


def test_opcheck():
    given = {n: t.requires_grad_() for n, t in arguments((6,), D=4, H=9, r=2).items()}
    x, base_out, A, B = given.values()
    seed, columns = torch.tensor(3, device=DEVICE), torch.tensor([1, 5], device=DEVICE)
    scale = torch.rand(9, device=DEVICE)
    S = normal(6, 2, seed=5).requires_grad_()
    library = torch.ops.swkernels
    for more in ((None, None, 0.0, None, None), (scale, columns, 0.3, seed, None)):
        torch.library.opcheck(library.lora_project.default, (x, A, *more))
    torch.library.opcheck(
        library.lora_expand.default, (base_out, S, B.detach().T, None, 0.0, None, None)
    )
    for y in (None, x.detach()):
        torch.library.opcheck(
            library.lora_expand.default, (y, S.detach(), A.detach(), scale, 0.3, seed, None)
        )
    torch.library.opcheck(
        library.lora_reduce.default, (x.detach(), S.detach(), scale, 0.3, seed, None)
    )


@pytest.mark.parametrize("kind", MASKS)
def test_compiles_without_a_break(kind):
    given, mask = arguments((30,)), mask_of(kind, 37, 45)

    def layer(x, weight, A, B):
        return ops.lora_linear(x, F.linear(x, weight), A, B, 2.0, mask, 0.3, SEED).square()

    torch.compiler.reset()  # PyTorch counts the builds of the other masks together with these
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (9, 30, 31):
        leaves = [normal(tokens, 45), normal(37, 45, seed=6), given["A"], given["B"]]
        found, plain = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
        y, want = compiled(*found), layer(*plain)
        torch.testing.assert_close(y, want)
        y.sum().backward()
        want.sum().backward()
        for ours, theirs in zip(found, plain):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20),
    st.sampled_from(MASKS), st.sampled_from(SCALES), st.sampled_from((0.0, 0.3)),
)  # fmt: skip
def test_any_shape(T, D, H, r, kind, scale, dropout):
    given, mask = arguments((T,), D, H, r), mask_of(kind, D, H, scale, count=3)
    y = ops.lora_linear(**given, scaling=0.5, mask=mask, dropout=dropout, seed=SEED)
    wide = {name: tensor.double() for name, tensor in given.items()}
    want = expected(**wide, scaling=0.5, mask=mask, dropout=dropout)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"A": normal(8, 44)}, r"A must be \[r, 45\] and B \[37, r\]"),
        ({"B": normal(36, 8)}, r"got \[8, 45\] and \[36, 8\]"),
        ({"A": normal(0, 45), "B": normal(37, 0)}, "r of at least 1"),
        ({"A": normal(45)}, "A must be"),
        ({"base_out": normal(2, 8, 37)}, "the same tokens"),
        ({"x": torch.zeros(2, 9, 45, dtype=torch.int32)}, "dequantize"),
        ({"A": torch.zeros(8, 45, dtype=torch.int8)}, "A must be a floating-point tensor"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": 0.1, "seed": -1}, "seed must be an integer"),
        ({"dropout": 0.1, "seed": torch.tensor(1.0)}, "int64 scalar"),
        ({"mask": "rows"}, "must be a LoraMask, got str"),
        ({"mask": ops.LoraMask(row_scale=torch.ones(45))}, r"row_scale must be .* \[37\]"),
        ({"mask": ops.LoraMask(column_scale=torch.ones(37))}, r"column_scale must be .* \[45\]"),
        ({"mask": mask_of("positions", 37, 44)}, r"of a weight \[37, 44\], this one is \[37, 45\]"),
    ],
)
def test_bad_arguments(changes, says):
    given = arguments() | {"scaling": 2.0} | changes
    before = given["base_out"].clone()
    with pytest.raises(InvalidInput, match=says) as caught:
        ops.lora_linear(**given, inplace=True)
    assert "\n" not in str(caught.value)
    assert torch.equal(given["base_out"], before)


@pytest.mark.parametrize("scale", [-0.1, 1.1, float("nan"), float("inf"), "0.5", True])
def test_bad_scales(scale):
    with pytest.raises(InvalidInput, match=r"scale s must"):
        ops.LoraMask.of(torch.tensor([[1, 2]]), (4, 4), scale, rows=True)


def test_bad_masks():
    with pytest.raises(InvalidInput, match="rows, columns or positions"):
        ops.LoraMask.of(torch.tensor([[1, 2]]), (4, 4), 0.5)
    with pytest.raises(InvalidInput, match=r"\[4, 2\] lies outside"):
        ops.LoraMask.of(torch.tensor([[4, 2]]), (4, 4), 0.5, positions=True)


def test_an_explicit_backend_that_cannot_raises():
    with pytest.raises(BackendUnavailable, match="float64"):
        ops.lora_linear(**arguments(dtype=torch.float64), scaling=2.0, backend="cpu")
    assert DTYPES  # the others are taken, see above
