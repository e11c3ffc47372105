"""SparseDelta: the values beside a layer."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F

from swkernels.errors import InvalidInput
from swkernels.nn import SparseDelta

PAIRS = torch.tensor([[3, 4], [0, 1], [3, 0]])  # in no order


def delta_of(**names) -> SparseDelta:
    delta = SparseDelta((5, 6))
    for name, values in names.items():
        delta.add_adapter(name, PAIRS)
        delta.values[name].data = torch.tensor(values)
    return delta


def test_values_are_in_the_order_of_rows_then_columns():
    delta = delta_of(a=[1.0, 2.0, 3.0])
    assert delta.coordinates("a").tolist() == [[0, 1], [3, 0], [3, 4]]
    x, y = torch.randn(2, 7, 6), torch.randn(2, 7, 5)
    weight = torch.zeros(5, 6)
    weight[0, 1], weight[3, 0], weight[3, 4] = 1.0, 2.0, 3.0
    assert torch.allclose(delta.add(x, y, inplace=False), y + F.linear(x, weight), atol=1e-6)


def test_active_adapters_add_up_and_one_can_be_removed():
    delta = delta_of(a=[1.0, 0.0, 0.0], b=[2.0, 0.0, 0.0])
    x, y = torch.ones(1, 6), torch.zeros(1, 5)
    assert delta.add(x, y, inplace=False)[0, 0] == 3
    delta.active = ["b"]
    assert delta.add(x, y, inplace=False)[0, 0] == 2
    delta.remove_adapter("b")
    assert delta.active == [] and list(delta.values) == ["a"]
    assert torch.equal(delta.add(x, y, inplace=False), y)
    assert all(name.startswith("a_") for name, _ in delta.named_buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_stay_float32_where_a_model_is_cast(dtype):
    delta = delta_of(a=[1.0, 1 / 3, 2.0])
    kept = delta.values["a"]
    delta.to(dtype)
    assert delta.values["a"].dtype == torch.float32
    assert torch.equal(delta.values["a"], torch.tensor([1.0, 1 / 3, 2.0]))
    assert delta.values["a"] is kept  # an optimizer that has it still trains it
    assert delta.double().values["a"].dtype == torch.float64


def test_only_values_are_in_the_state_dict_and_a_pickle_survives():
    delta = delta_of(a=[1.0, 2.0, 3.0])
    assert list(delta.state_dict()) == ["values.a"]
    again = pickle.loads(pickle.dumps(delta))
    x, y = torch.randn(3, 6), torch.randn(3, 5)
    assert torch.equal(again.add(x, y, inplace=False), delta.add(x, y, inplace=False))


def test_what_is_refused():
    delta = delta_of(a=[1.0, 2.0, 3.0])
    with pytest.raises(InvalidInput, match="'a' already"):
        delta.add_adapter("a", PAIRS)
    with pytest.raises(InvalidInput, match=r"\[5, 0\]"):
        delta.add_adapter("b", torch.tensor([[5, 0]]))
    with pytest.raises(InvalidInput, match="more than once"):
        delta.add_adapter("b", torch.tensor([[1, 1], [1, 1]]))
    assert list(delta.values) == ["a"] and delta.active == ["a"]
