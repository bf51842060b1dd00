"""The processes of a run: one by itself, or as many as torchrun started."""

from __future__ import annotations

import atexit
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .files import first_line
from .settings import ConfigError

T = TypeVar("T")
MEETING = 600.0  # seconds that processes started together may be apart
# Seconds before the interpreter ends in which gloo's threads drop the tensors of their last sum. They need its lock for that,
# and Python ends a thread that asks for the lock too late, which C++ answers by aborting the process: 5 of 66 runs of a
# script without this wait ended so on a loaded machine, all of their work done.
LETTING_GO = 0.25


class Ranks(NamedTuple):
    """This process's number and the number of all; the same on this machine; how often torchrun has restarted them."""

    rank: int = 0
    count: int = 1  # pyright: ignore[reportIncompatibleMethodOverride] (tuple's own is not missed)
    local_rank: int = 0
    local_count: int = 1
    restarts: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values`, added up over all processes in place; nothing waits for it but the device."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in every process; where it fails, all end, and the first says why."""
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, True]
        if not self.first:
            dist.broadcast_object_list(outcome, src=0)
            if not outcome[1]:
                sys.exit(2)
            return outcome[0]
        try:
            outcome[0] = make()
        except BaseException:
            dist.broadcast_object_list([None, False], src=0)
            raise
        dist.broadcast_object_list(outcome, src=0)
        return outcome[0]


ALONE = Ranks()


def read_ranks() -> Ranks:
    """The ranks that torchrun's environment variables tell; one process without them.

    Raises:
        ConfigError: a variable is no number, or the numbers are impossible.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    defaults = (0, 1, 0, 1, 0)
    try:
        ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in zip(names, defaults, strict=True)))
    except ValueError as error:
        raise ConfigError(f"the environment variables {', '.join(names)} are not torchrun's ({error})") from error
    for name, rank, count in zip(names[::2], (ranks.rank, ranks.local_rank), (ranks.count, ranks.local_count), strict=False):
        if not 0 <= rank < count:
            raise ConfigError(f"the environment variable {name} is {rank}; of {count} processes it must be 0 to {count - 1}")
    if not ranks.local_count <= ranks.count < 2**31 or ranks.restarts < 0:
        words = f"LOCAL_WORLD_SIZE is {ranks.local_count}, TORCHELASTIC_RESTART_COUNT {ranks.restarts}"
        raise ConfigError(f"the environment variables are not torchrun's: of {ranks.count} processes {words}")
    return ranks


@contextmanager
def process_group(ranks: Ranks, device: torch.device, alone: bool = False) -> Iterator[None]:
    """The process group of a run of several processes, or of one `alone`: nccl between GPUs, gloo elsewhere.

    One that is there already serves, and stays. One process gives its own back however it ends, so that the next run in it
    starts anew; of several, whose others may be waiting in a sum, a failed one leaves that to the end of the process.

    Raises:
        ConfigError: the processes cannot meet.
    """
    if (ranks.count == 1 and not alone) or dist.is_initialized():
        yield
        return
    _join(ranks, device)
    try:
        yield
    except BaseException:
        if ranks.count == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _join(ranks: Ranks, device: torch.device) -> None:
    if device.type == "cuda" and device.index is not None:  # without an index it is the current one, which PyTorch refuses
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "gloo":
        atexit.register(time.sleep, LETTING_GO)
    if ranks.count == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        _meet_by(backend, ranks)
    except (KeyError, ValueError, RuntimeError) as error:
        place = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(f"the {ranks.count} processes of the run cannot meet at {place}: {first_line(error)}") from error


def _meet_by(backend: str, ranks: Ranks) -> None:
    """Makes the process group where the environment says."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    store = dist.PrefixStore(meet(store, ranks), store)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.count)


def meet(store: dist.Store, ranks: Ranks, seconds: float = MEETING) -> str:
    """A name that the processes started together share, and no process that torchrun started before has had.

    PyTorch takes torchrun's count of restarts for that name. But an agent counts only the failures of its own processes, so
    that after one elsewhere the processes of two machines wait under different names for ever; and the store of all
    restarts is one, so that what was written before is still there.

    Raises:
        RuntimeError: the others are not there within `seconds`.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + seconds
    if ranks.first:
        store.set("crate_fast/name", own)
    while time.monotonic() < end:
        if store.check(["crate_fast/name"]):
            name = store.get("crate_fast/name").decode()
            store.set(f"crate_fast/{name}/{ranks.rank}", own)
            keys = [f"crate_fast/{name}/{rank}" for rank in range(ranks.count)]
            if ranks.first and store.check(keys):
                store.set(f"crate_fast/{name}/all", " ".join(store.get(key).decode() for key in keys))
            # An older name's list does not have this process in it.
            if store.check([f"crate_fast/{name}/all"]) and own in store.get(f"crate_fast/{name}/all").decode().split():
                return name
        time.sleep(0.05)
    raise RuntimeError(f"{ranks.count} processes did not meet within {seconds:.0f} seconds")
