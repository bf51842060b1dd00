"""The processes of a run: one by itself, or as many as torchrun started."""

from __future__ import annotations

import atexit
import errno
import os
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .files import patiently, reason_of
from .settings import ConfigError

T = TypeVar("T")
MEETING = 600.0  # seconds that processes started together may be apart
ANSWERING = 30.0  # seconds in which what listens at MASTER_PORT must answer as it should
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
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not given or (given == ["WORLD_SIZE"] and _variable("WORLD_SIZE", 1, 1) == 1):
        return ALONE
    if len(given) == 1:  # each process would be a run by itself
        missing = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise ConfigError(
            f"the environment variable {given[0]} is set and {missing} is not; torchrun sets both, one process none"
        )
    count, local_count = _variable("WORLD_SIZE", 1, 1), _variable("LOCAL_WORLD_SIZE", 1, 1)
    if local_count > count:
        raise ConfigError(f"the environment variable LOCAL_WORLD_SIZE is {local_count}, of {count} processes (WORLD_SIZE)")
    ranks = {name: _variable(name, 0, 0) for name in ("RANK", "LOCAL_RANK")}
    for (name, rank), most in zip(ranks.items(), (count, local_count), strict=True):
        if rank >= most:
            raise ConfigError(f"the environment variable {name} is {rank}; of {most} processes it must be 0 to {most - 1}")
    restarts = _variable("TORCHELASTIC_RESTART_COUNT", 0, 0)
    return Ranks(ranks["RANK"], count, ranks["LOCAL_RANK"], local_count, restarts)


def _variable(name: str, default: int | None, least: int, most: int = 2**31 - 1) -> int:
    """A whole number in the environment; raises ConfigError where it is none, not within its bounds, or not there."""
    text = os.environ.get(name, "" if default is None else str(default)).strip()
    number = int(text) if text.isascii() and text.lstrip("-").isdigit() and len(text) < 20 else None
    if number is None or not least <= number <= most:
        said = "not set" if name not in os.environ else repr(text[:40])
        raise ConfigError(f"the environment variable {name} is {said}; it must be a whole number from {least} to {most}")
    return number


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
    except (OSError, ValueError, RuntimeError) as error:
        place = ":".join(os.environ.get(name, f"({name} is not set)")[:100] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(f"the {ranks.count} processes of the run cannot meet at {place}: {reason_of(error)}") from error


def _meet_by(backend: str, ranks: Ranks) -> None:
    """Makes the process group where the environment says."""
    address, port = os.environ.get("MASTER_ADDR", "").strip(), _variable("MASTER_PORT", None, 1, 65535)
    if not address:
        raise ConfigError("the environment variable MASTER_ADDR is not set; it must be the first process's machine")
    patiently(partial(_resolve, address))
    listens = ranks.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if listens:
        _check_free(port)
    else:
        _wait_for(address, port)
    store = _within(ANSWERING, partial(_open_store, address, port, listens))
    store.set_timeout(timedelta(seconds=MEETING))
    store = dist.PrefixStore(meet(store, ranks), store)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.count)


# What PyTorch would wait for outside of Python, where it hears no signal, and with lines of its own.


def _open_store(address: str, port: int, listens: bool) -> dist.TCPStore:
    return dist.TCPStore(address, port, is_master=listens, wait_for_workers=False, timeout=timedelta(seconds=ANSWERING))


def _within(seconds: float, make: Callable[[], T]) -> T:
    """What `make` gives or raises, of a thread that is left to itself where it takes longer: OSError says so then.

    PyTorch's store has a time limit for its answers, but none for the first one, which a stranger at the port never gives.
    """
    outcome: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((make(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        made, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise OSError(errno.ETIMEDOUT, f"what listens there does not answer within {seconds:.0f} seconds") from None
    if error is not None:
        raise error
    return cast(T, made)


def _resolve(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except UnicodeError as error:  # a name of more than 63 letters, for one
        raise OSError(errno.EINVAL, "no name of a machine") from error


def _check_free(port: int) -> None:
    """Raises OSError where another process listens at `port` of this machine."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind(("", port))
        tried.listen()


def _wait_for(address: str, port: int) -> None:
    """Returns when somebody listens at `port`; raises OSError where nobody does within `MEETING` seconds."""
    end = time.monotonic() + MEETING
    while True:
        try:
            return socket.create_connection((address, port), timeout=5).close()
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


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
