"""Expected times: FLOP, bytes and floors against figures worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks import expected
from benchmarks.shapes import MODELS, projections


def test_llama_3_8b_down_projection_by_hand():
    (work,) = expected.linear_absmax(4096, 4096, 14336, "bfloat16")
    assert work.flop == 2 * 4096 * 4096 * 14336 == 481_036_337_152
    keys = 8 * (4096 + 14336)
    assert work.read == 2 * (4096 * 14336 + 4096 * 14336) + keys
    assert work.write == 2 * 4096 * 4096 + keys
    seconds, binding = expected.floor([work], expected.PUBLISHED["H100 SXM"], "bfloat16")
    assert binding == "gemm"
    assert seconds == pytest.approx(486.4e-6, rel=1e-3)


def test_column_absmax_is_a_read():
    (work,) = expected.column_absmax(8192, 2048, "float32")
    assert work.read == 4 * 8192 * 2048 + 8 * 2048 and work.flop == 0
    seconds, binding = expected.floor([work], expected.PUBLISHED["H200 SXM"], "float32")
    assert binding == "read" and seconds == pytest.approx(67.14e6 / 4.8e12, rel=1e-3)


def test_packed_weights_by_hand():
    (work,) = expected.block_quantize(4096, 14336, 4, 64, "float32")
    elements = 4096 * 14336
    assert work.read == 4 * elements == 234_881_024
    assert work.write == elements // 2 + elements // 64 * 4 == 33_030_144
    (back,) = expected.block_dequantize(4096, 14336, 4, 64, "float32")
    assert (back.read, back.write) == (work.write, work.read)
    (product,) = expected.quant_linear(3, 4096, 14336, 4, 64, "bfloat16")
    assert product.read == 2 * 3 * 14336 + work.write and product.write == 2 * 3 * 4096
    assert product.flop == 2 * 3 * elements
    assert expected.packed_bytes(3, 5, 4, 4) == 8 + 4 * 4  # odd ones are rounded up


def test_an_mlp_is_the_sum_of_its_pieces():
    pieces = expected.swiglu_mlp(16384, 8192, 28672, "bfloat16")
    ceilings = expected.PUBLISHED["H100 SXM"]
    one_by_one = sum(expected.floor([piece], ceilings, "bfloat16")[0] for piece in pieces)
    assert expected.floor(pieces, ceilings, "bfloat16")[0] == pytest.approx(one_by_one)
    assert sum(piece.flop for piece in pieces) == 3 * 2 * 16384 * 8192 * 28672


def test_one_token_is_bound_by_memory():
    work = expected.linear_absmax(1, 4096, 14336, "bfloat16")
    assert expected.floor(work, expected.PUBLISHED["H100 SXM"], "bfloat16")[1] == "copy"


def test_predicted_rows_name_every_operation_and_machine():
    rows = expected.predicted_rows()
    assert {row["op"] for row in rows} == {
        "column_absmax", "linear_absmax", "glu_absmax", "tracked_mlp", "sampled_grad",
        "sparse_linear", "quant_linear",
    }  # fmt: skip
    assert all(set(row["seconds"]) == set(expected.PUBLISHED) for row in rows)
    assert all(row["seconds"]["H200 SXM"] <= row["seconds"]["H100 SXM"] for row in rows)


def test_projections_share_equal_weights():
    found = {(p.name, p.rows, p.columns): p.models for p in projections()}
    shared = found["down_proj", 4096, 14336]
    assert shared == ("Llama-3-8B", "Mistral-7B", "Mixtral-8x7B")
    assert found["down_proj", 576, 1536] == ("SmolLM2-135M",)
    assert found["q_proj, o_proj", 576, 576] == ("SmolLM2-135M",)
    assert found["k_proj, v_proj", 1024, 8192] == ("Llama-3-70B",)
    assert {model for models in found.values() for model in models} == {m.name for m in MODELS}
