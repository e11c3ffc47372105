"""The processes that scan together: who does what, and how they tell each other.

Work is given out by number, and what comes back is merged by maximum or gathered by rank, so every
rank ends with what one process would have. All traffic is small and goes through gloo, on a GPU
too: keys and numbers are a few megabytes a scan, gloo's timeout is an error that can be caught
(NCCL's ends the process), and what is sent is JSON or plain tensors, never a pickle.

After each piece of work the ranks exchange a flag, one piece behind, so that nobody waits for the
exchange itself: an error of one rank stops all of them within two pieces of work, and a rank that
dies or hangs is noticed then and not at the end of its share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from swkernels.errors import InvalidInput, RankFailed

from .tensor_bytes import bytes_of, form_of

TIMEOUT = 600.0  # seconds


class Ranks:
    """The processes that scan together, and this one's place among them.

    Made by ``alone``, ``of_group`` or ``from_environment``. Every rank must do the same calls in
    the same order.

    Attributes:
        rank, size: this process and how many there are.
        timeout: seconds that a rank may be behind another before the others give up.
    """

    def __init__(self, rank: int = 0, size: int = 1, timeout: float = TIMEOUT, group=None):
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self._group = group
        self._pending: tuple | None = None  # the exchange that is under way
        self._over = False  # nothing can be exchanged any more
        self._step: str | None = None  # what this rank is at
        self._owns_world = False

    @classmethod
    def alone(cls) -> Ranks:
        """One process."""
        return cls()

    @classmethod
    def of_group(cls, timeout: float = TIMEOUT) -> Ranks:
        """The ranks of the process group that is initialised; every rank must call this.

        Raises:
            InvalidInput: none is initialised.
        """
        import torch.distributed as dist

        _check_timeout(timeout)
        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidInput(
                "torch.distributed is not initialised: call init_process_group, or use "
                "Ranks.from_environment() under torchrun"
            )
        try:
            # A group of its own: gloo whatever the caller's is, with this timeout.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        except RuntimeError as error:
            raise RankFailed(f"the ranks do not meet: {_first_line(error)}") from error
        return cls(dist.get_rank(), dist.get_world_size(), timeout, group)

    @classmethod
    def from_environment(cls, timeout: float = TIMEOUT) -> Ranks:
        """The ranks that torchrun started (or a group that is initialised), else one process.

        Raises:
            InvalidInput: this PyTorch has no torch.distributed.
            RankFailed: the others did not come within the timeout.
        """
        import torch.distributed as dist

        _check_timeout(timeout)
        if dist.is_available() and dist.is_initialized():
            return cls.of_group(timeout)
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return cls.alone()
        if not dist.is_available():
            raise InvalidInput("this PyTorch was built without torch.distributed: run one process")
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise RankFailed(
                f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} does not meet the "
                f"others: {_first_line(error)}; check MASTER_ADDR and MASTER_PORT, or "
                "GLOO_SOCKET_IFNAME where the machine has no name of its own, or unset RANK to "
                "run one process"
            ) from error
        ranks = cls.of_group(timeout)
        ranks._owns_world = True
        return ranks

    def device(self, name: str | None) -> str | None:
        """The device that this rank takes where the caller names none or just "cuda"."""
        shared = name is None or name == "cuda"
        if self.size > 1 and shared and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
            return f"cuda:{int(os.environ['LOCAL_RANK'])}"
        return name

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the group, and end ``torch.distributed`` where ``from_environment`` began it."""
        if self._group is None:
            return
        import torch.distributed as dist

        group, self._group, self._over = self._group, None, True
        if dist.is_initialized():
            dist.destroy_process_group(None if self._owns_world else group)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def share(self, items: list, step: str) -> Iterator:
        """Yield this rank's items, in turn with the others', and exchange flags after each."""
        yield from self.in_rounds(items[self.rank :: self.size], len(items), step)

    def stretch(self, items: list) -> list:
        """This rank's items where neighbours belong together; for ``in_rounds``."""
        ends = [len(items) * rank // self.size for rank in range(self.size + 1)]
        return items[ends[self.rank] : ends[self.rank + 1]]

    def in_rounds(self, mine: Iterable, total: int, step: str) -> Iterator:
        """Yield this rank's items of ``total``, and exchange flags after each."""
        self._step = step
        rounds = -(-total // self.size)  # as many on a rank that has an item less
        for item in mine:
            yield item
            self._beat(step)
            rounds -= 1
        for _ in range(rounds):
            self._beat(step)
        self._step = None

    def merge_max_(self, tensors: list[torch.Tensor], step: str) -> None:
        """Replace int64 tensors, of the same shapes on every rank, by their maximum over ranks."""
        if self.size == 1:
            return
        import torch.distributed as dist

        self._agree(step)
        flat = torch.cat([tensor.flatten().cpu() for tensor in tensors])
        with self._meeting(step):
            dist.all_reduce(flat, dist.ReduceOp.MAX, group=self._group)
        for tensor, merged in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(merged.view(tensor.shape))

    def gather(self, document, step: str) -> list:
        """Every rank's document, by rank; JSON's types, in which floats stay what they are."""
        if self.size == 1:
            return [document]
        return [json.loads(data) for data in self._exchange(json.dumps(document).encode(), step)]

    def send(self, to: int, document, tensors: list[torch.Tensor], step: str) -> None:
        """Send a document of JSON's types and tensors to another rank, which must ``receive``."""
        import torch.distributed as dist

        head = json.dumps({"document": document, "tensors": [form_of(t) for t in tensors]}).encode()
        parts = [torch.frombuffer(bytearray(head), dtype=torch.uint8)]
        parts += [bytes_of(tensor) for tensor in tensors if tensor.numel()]
        with self._meeting(step):
            dist.send(torch.tensor([len(head)]), self._peer(to), group=self._group)
            for part in parts:
                dist.send(part, self._peer(to), group=self._group)

    def receive(self, sender: int, step: str) -> tuple[object, list[torch.Tensor]]:
        """The document and the tensors, on the CPU, that another rank sends."""
        import torch.distributed as dist

        with self._meeting(step):
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, self._peer(sender), group=self._group)
            head = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(head, self._peer(sender), group=self._group)
            found = json.loads(head.numpy().tobytes())
            tensors = []
            for form in found["tensors"]:
                tensors.append(torch.empty(form["shape"], dtype=getattr(torch, form["dtype"])))
                if tensors[-1].numel():
                    raw = torch.empty(tensors[-1].nbytes, dtype=torch.uint8)
                    dist.recv(raw, self._peer(sender), group=self._group)
                    tensors[-1] = raw.view(tensors[-1].dtype).view(form["shape"])
        return found["document"], tensors

    def _peer(self, rank: int) -> int:
        """The number that ``torch.distributed`` as a whole has for a rank of the group."""
        import torch.distributed as dist

        return dist.get_global_rank(self._group, rank)

    def check_equal(self, document, what: str) -> None:
        """Refuse ranks that do not agree on ``document``.

        Raises:
            InvalidInput: on every rank.
        """
        every = self.gather(document, f"comparing {what}")
        others = [rank for rank, other in enumerate(every) if other != every[0]]
        if others:
            raise InvalidInput(
                f"rank {others[0]} and rank 0 differ in {what}: give every rank the same model, "
                "inputs and settings"
            )

    @contextmanager
    def together(self, step: str) -> Iterator[None]:
        """A block that ends well on every rank or with an error on every rank.

        Raises:
            RankFailed: another rank's block ended with an error, which the message repeats.
        """
        try:
            yield
            self._agree(step)
        except Exception as error:
            self._tell(f"{self._step or step}: {type(error).__name__}: {_first_line(error)}")
            raise

    def _tell(self, message: str) -> None:
        """Let the others know, if they can still be told, that this rank stops."""
        if self.size == 1 or self._over:
            return
        try:
            self._exchange(message.encode(), "telling them of an error", failed=True)
        except RankFailed:
            pass  # this rank's own error is the one to raise here
        self._over = True

    def _agree(self, step: str) -> None:
        self._exchange(b"", step)

    def _exchange(self, data: bytes, step: str, failed: bool = False) -> list[bytes]:
        """Every rank's bytes, once all ranks are here and none has failed."""
        if self.size == 1:
            return [data]
        self._finish(step)
        self._begin(len(data), failed)
        return self._finish(step, data)

    def _beat(self, step: str) -> None:
        """Say that this rank goes on, and hear whether all went on when it last did."""
        if self.size > 1:
            self._finish(step)
            self._begin(0, False)

    def _begin(self, length: int, failed: bool) -> None:
        import torch.distributed as dist

        if self._over:
            raise RankFailed("the ranks have parted after an error: start them again")
        header = torch.tensor([failed, length])
        headers = [torch.empty_like(header) for _ in range(self.size)]
        work = dist.all_gather(headers, header, group=self._group, async_op=True)
        self._pending = work, headers, header

    def _finish(self, step: str, data: bytes = b"") -> list[bytes]:
        """End the exchange that is under way, if one is, in which this rank said ``data``."""
        if self._pending is None:
            return []
        (work, headers, _), self._pending = self._pending, None
        with self._meeting(step):
            work.wait()
            gathered = self._gather_bytes(data, [int(length) for _, length in headers])
        for rank, (failed, _) in enumerate(headers):
            if failed:
                self._over = True
                said = gathered[rank].decode(errors="replace")
                raise RankFailed(f"rank {rank} stopped while {said}")
        return gathered

    def _gather_bytes(self, data: bytes, lengths: list[int]) -> list[bytes]:
        import torch.distributed as dist

        longest = max(lengths)
        if longest == 0:
            return [b""] * self.size
        own = torch.zeros(longest, dtype=torch.uint8)
        if data:
            own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, group=self._group)
        return [t[:length].numpy().tobytes() for t, length in zip(every, lengths)]

    @contextmanager
    def _meeting(self, step: str) -> Iterator[None]:
        """Turn gloo's errors into one that says what to do."""
        try:
            yield
        except RuntimeError as error:
            self._over = True
            raise RankFailed(
                f"rank {self.rank} lost the others while {step}: a rank has died, or one is more "
                f"than {self.timeout:g} s behind; start them again (with a state file the scan "
                f"goes on from there), or give a longer timeout [{_first_line(error)}]"
            ) from error


def _check_timeout(timeout: float) -> None:
    if not 0 < timeout < float("inf"):
        raise InvalidInput(f"the timeout of ranks must be some seconds, got {timeout}")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
