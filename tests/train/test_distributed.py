"""Two processes end with the same values as one: DDP, and FSDP2 with a sharded base."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":  # a rank
    sys.path.insert(0, str(Path(__file__).parents[2]))

from swkernels.train import Coordinates, sparse
from swkernels.train.sparse import whole
from tests.models.tiny import tiny_model, token_ids
from tests.processes import run_ranks

STEPS = 3
MODES = ("ddp", "fsdp")


def train(model, parameters, ids, forward=None) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (forward or model)(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


def adapted():
    model = tiny_model("llama")
    return model, sparse(model, Coordinates.random(model, 50, seed=1))


def worker(mode: str, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ids = token_ids(4, 16).chunk(2)[rank]
    model, handle = adapted()
    if mode == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        train(model, handle.parameters(), ids, wrapped)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert hasattr(model.model.layers[0].mlp.down_proj.weight, "to_local")
        train(model, handle.parameters(), ids)
        try:
            handle.merge()
        except Exception as error:
            Path(folder, f"merge-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    values = [whole(value.detach()).clone() for value in handle.parameters()]
    torch.save(values, Path(folder, f"{rank}.pt"))
    handle.save(Path(folder, f"{rank}.safetensors"))
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_end_as_one(mode, tmp_path):
    run_ranks(__file__, mode, str(tmp_path))
    model, handle = adapted()
    train(model, handle.parameters(), token_ids(4, 16))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for value, first, second in zip(handle.parameters(), *ranks):
        assert torch.equal(first, second)
        # Two halves are averaged in another order than one mean takes; Adam divides by the root
        # of a square, so that a tiny gradient's rounding shows.
        assert torch.allclose(first, value, rtol=1e-3, atol=1e-5)
        assert first.any()
    loaded_model, loaded = adapted()
    for rank in range(2):  # a file of either process holds the whole values
        loaded.load(tmp_path / f"{rank}.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(ranks[rank], loaded.parameters()))
    if mode == "fsdp":
        said = (tmp_path / "merge-0.txt").read_text()
        assert said.startswith("InvalidInput") and "wrapped tensor" in said


if __name__ == "__main__":
    worker(*sys.argv[1:])
