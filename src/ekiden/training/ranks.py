"""The processes that train one run together, and how they agree; a run of one process is the trivial case.

`torchrun` and `accelerate launch` set RANK, WORLD_SIZE and the rest in the environment; `Ranks.join` reads them and
nothing else. The loop asks here whose turn it is and what all have seen. Everything that is agreed is small and goes
over a group of its own on the CPU, so that no GPU is waited for; what is exchanged is JSON and tensors, never pickles.

Each rank's own work (forward, backward, reading, writing) happens between agreements, so that what goes wrong on one of
them is known to all before any waits for it. For what cannot be caught, `training.watch` looks after the others.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ekiden import progress
from ekiden.errors import UserError
from ekiden.training.watch import Peer, Watch

T = TypeVar("T")

GROUP_TIMEOUT = datetime.timedelta(hours=2)
"""Longest that one rank works while the others wait for it, as when a large checkpoint is verified. A rank that is
gone or frozen is noticed by `training.watch`, long before."""
LARGE_BYTES = 256 << 10
"""A tensor of this size is exchanged where it lies; copies to and from a buffer cost more than the call they save."""
BUCKET_BYTES = 16 << 20
"""Smaller ones are exchanged together, so many bytes at a time; also the most that is received beside what it is added to,
unless one tensor is larger."""


class PeerLost(UserError):
    """Another rank failed or is gone, so this one stops; `rank` is the one at fault.

    quiet: another process says it, this one need not.
    """

    def __init__(self, sentence: str, rank: int, quiet: bool = False) -> None:
        super().__init__(sentence)
        self.rank, self.quiet = rank, quiet


class Ranks:
    """The processes of a run.

    Attributes:
        rank, world: this process's number and how many there are. local_rank, local_world: the same on this machine.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, local_world: int = 1) -> None:
        self.rank, self.world = rank, world
        self.local_rank, self.local_world = local_rank, local_world
        self._control: Any = None
        self._watch: Watch | None = None

    @classmethod
    def join(cls, device: str = "auto", silence_seconds: float = 60.0) -> Ranks:
        """Return the ranks that the environment names; wait until all have come.

        Args:
            device: as `--device`; says whether gradients go over NCCL or gloo.
            silence_seconds: a rank that has not answered for so long is taken for lost.

        Raises:
            UserError: the environment is not one that torchrun sets, or the others did not come.
        """
        world = _number("WORLD_SIZE", 1)
        if world == 1:
            return cls()
        ranks = cls(_number("RANK"), world, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1))
        if not ranks.main:
            progress.silence()
        ranks._connect(device, silence_seconds)
        return ranks

    def _connect(self, device: str, silence_seconds: float) -> None:
        on_gpu = device != "cpu" and torch.cuda.is_available()
        try:
            if not dist.is_initialized():
                if on_gpu:
                    torch.cuda.set_device(self.local_rank)
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                    store=store_of_this_start(self.rank, self.world),
                    rank=self.rank,
                    world_size=self.world,
                    timeout=GROUP_TIMEOUT,
                )
            self._control = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
            store = dist.PrefixStore("ekiden", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
            peers = [
                Peer(**facts) for facts in self.gather({"host": socket.gethostname(), "pid": os.getpid()})
            ]
            self._watch = Watch(store, self.rank, peers, silence_seconds)
            self.barrier()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"rank {self.rank} could not meet the other {self.world - 1} ({str(error).splitlines()[0]}); start all "
                "with the same torchrun command, and see that MASTER_ADDR can be reached"
            ) from None
        self._watch.start()

    @property
    def main(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    # -- agreement --------------------------------------------------------------------------------------------

    def agree(self, values: Sequence[float]) -> list[float]:
        """Return the largest that any rank has for each of `values` (numbers exact in float64)."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control)
        return tensor.tolist()

    def any(self, value: object) -> bool:
        """Return whether `value` is true on any rank."""
        return self.agree([bool(value)])[0] > 0

    def first(self, text: str | None) -> tuple[int, str] | None:
        """Return rank and text of the lowest rank that has a text, the same on all; None where none has."""
        if self.world == 1:
            return (0, text) if text is not None else None
        if not self.any(text is not None):
            return None
        return next((rank, given) for rank, given in enumerate(self.gather(text)) if given is not None)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's JSON `value`, in the order of ranks."""
        if self.world == 1:
            return [value]
        data = json.dumps(value).encode()
        size = int(self.agree([len(data)])[0])
        mine = torch.zeros(8 + size, dtype=torch.uint8)
        mine[:8] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
        mine[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine, group=self._control)
        raw = [bytes(part.numpy()) for part in parts]
        return [json.loads(part[8 : 8 + int.from_bytes(part[:8], "little")]) for part in raw]

    def from_main(self, value: Any = None) -> Any:
        """Return the main rank's JSON `value` on all."""
        if self.world == 1:
            return value
        data = json.dumps(value).encode() if self.main else b""
        size = int(self.agree([len(data)])[0])
        buffer = torch.zeros(size, dtype=torch.uint8)
        if self.main:
            buffer[:] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, src=0, group=self._control)
        return json.loads(bytes(buffer.numpy()))

    def on_main(self, work: Callable[[], T]) -> T:
        """Return on all ranks what `work`, done by the main one, returned (a JSON value).

        Raises:
            UserError: it raised one there; the others raise `PeerLost`. Anything else it raised ends the main rank.
        """
        if self.world == 1:
            return work()
        result: Any = None
        problem: UserError | None = None
        if self.main:
            try:
                result = work()
            except UserError as error:
                problem = error
        told = self.from_main(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        if told is not None:
            raise PeerLost(told, 0, quiet=True)
        return self.from_main(result)

    def barrier(self) -> None:
        """Return when all ranks are here."""
        if self.world > 1:
            dist.monitored_barrier(group=self._control, timeout=GROUP_TIMEOUT)

    # -- tensors ----------------------------------------------------------------------------------------------

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, the same on every rank; large ones in place, all under way at once."""
        if self.world == 1:
            return
        in_place = [tensor for tensor in tensors if tensor.nbytes >= LARGE_BYTES and tensor.is_contiguous()]
        works = [dist.all_reduce(tensor, async_op=True) for tensor in in_place]
        taken = {id(tensor) for tensor in in_place}
        for bucket in buckets([tensor for tensor in tensors if id(tensor) not in taken], BUCKET_BYTES):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                tensor.copy_(part.view_as(tensor))
        for work in works:
            work.wait()

    def add_partner(self, tensors: list[torch.Tensor], partner: int) -> None:
        """Add `partner`'s tensors, of the same shapes, to these, and give it these; a bucket of them is under way at once."""
        for bucket in buckets(tensors, BUCKET_BYTES):
            theirs = torch.empty(
                sum(tensor.numel() for tensor in bucket), dtype=bucket[0].dtype, device=bucket[0].device
            )
            parts = theirs.split([tensor.numel() for tensor in bucket])
            operations = []
            for tensor, part in zip(bucket, parts):
                operations += [
                    dist.P2POp(dist.isend, tensor.contiguous(), partner),
                    dist.P2POp(dist.irecv, part, partner),
                ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            for tensor, part in zip(bucket, parts):
                tensor.add_(part.view_as(tensor))

    def copy_from_main(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with the main rank's, in place."""
        if self.world > 1:
            dist.broadcast(tensor, src=0, group=self._control if tensor.device.type == "cpu" else None)

    # -- failure ----------------------------------------------------------------------------------------------

    def name(self, sentence: str) -> str:
        """Return `sentence` with this rank's name before it, where there are several."""
        return sentence if self.world == 1 else f"rank {self.rank}: {sentence}"

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Tell the others of an error in here, and take one that they caused for what it is.

        Raises:
            PeerLost: another rank failed or is gone.
        """
        if self._watch is None:
            yield
            return
        try:
            yield
        except PeerLost as lost:
            self._watch.stop()
            raise lost
        except BaseException as error:
            own = isinstance(error, UserError) or not _broken_connection(error)
            failure = None if own else self._watch.failure(wait_seconds=10.0)
            if failure is None:
                first = self._watch.announce(str(error) or type(error).__name__)
                if isinstance(error, UserError) and first != self.rank:
                    # The same mistake, found by all: one says it.
                    raise PeerLost(str(error), first, quiet=True) from None
                raise
            rank, sentence = failure
            raise PeerLost(sentence, rank, quiet=self.rank != self._watch.speaker(rank)) from None

    def leave(self) -> None:
        """End the session with all ranks; after a failure, alone."""
        if self._watch is None:
            return
        self._watch.stop()
        self._watch = None
        dist.destroy_process_group()


def _broken_connection(error: BaseException) -> bool:
    """Return whether `error` is what a collective raises when another rank is gone (gloo: a bare RuntimeError)."""
    if isinstance(error, dist.DistError):
        return True
    signs = ("onnection", "gloo", "NCCL", "Broken pipe", "process group", "Socket")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def store_of_this_start(rank: int, world: int) -> dist.Store:
    """Return the store in which the ranks of this start meet, and no dead ones of an earlier start.

    torchrun's own store lives on when it restarts the ranks. Its count of restarts (TORCHELASTIC_RESTART_COUNT) does not
    tell the starts apart: it is each node's own, and where the ranks of one node die, the other's are restarted uncounted.
    So rank 0 gives this start a name, and tells it whoever greets it, until all have answered under that name.

    Raises:
        RuntimeError: a rank did not come within GROUP_TIMEOUT.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 opens one for this start
        given, *_ = next(dist.rendezvous("env://", rank, world, timeout=GROUP_TIMEOUT))
        return given
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], _number("MASTER_PORT"), is_master=False, timeout=GROUP_TIMEOUT
    )
    own = uuid.uuid4().hex
    if rank:
        store.set(f"ekiden/hello/{rank}", own)
        name = store.get(f"ekiden/name/{own}").decode()  # waits for it
        store.set(f"ekiden/{name}/{rank}", "here")
        return dist.PrefixStore(f"ekiden/{name}", store)
    told: set[str] = set()
    latest = time.monotonic() + GROUP_TIMEOUT.total_seconds()
    while not store.check([f"ekiden/{own}/{other}" for other in range(1, world)]):
        if time.monotonic() > latest:
            raise RuntimeError("not all of them came")
        for other in range(1, world):
            if store.check([f"ekiden/hello/{other}"]):
                greeting = store.get(f"ekiden/hello/{other}").decode()
                if greeting not in told:  # perhaps of one that is dead; it will not answer
                    store.set(f"ekiden/name/{greeting}", own)
                    told.add(greeting)
        time.sleep(0.05)
    return dist.PrefixStore(f"ekiden/{own}", store)


def _number(name: str, default: int | None = None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdigit():
        raise UserError(
            f"the environment sets WORLD_SIZE but {name} is {value!r}; start with torchrun, or unset WORLD_SIZE"
        )
    return int(value)


def buckets(tensors: Sequence[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    """Yield `tensors`, in order, in groups of one dtype of about `limit` bytes."""
    group: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if group and (size + tensor.nbytes > limit or tensor.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield group
