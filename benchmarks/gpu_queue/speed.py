"""Rows of results on one GPU, whose memory does not hold all peers side by side.

Peers that run eagerly or compiled stay alive together with their weights and inputs only, and give their activations back
before the next one runs: between two samples the allocator's cache is emptied, and a call that is not counted fills it. A CUDA
graph keeps its memory, so graphs live one at a time and are recorded anew in each of `ROUNDS` rounds. The batch is the largest
of `BATCHES` that the first peer, the largest, has room for; where it runs out of memory that is a row, and the next is tried.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

import torch

import floors
from judge import Judge, make_ready
from peers import Peer, all_peers
from run import result
from timing import Timing, ceilings, conditions, interleave, quartiles
from workloads import DTYPES, Workload

from .queue import USABLE, kept_gib

BATCHES = (1024, 512, 256, 128)
SECONDS = 1.5
"""Of samples for a peer."""
ROUNDS = 3
POOLED = ("cuda graph",)
"""Modes whose peers keep the memory of a whole step."""
OUT_OF_MEMORY = "out of memory"


def memory_gib(device: torch.device) -> float:
    """The GPU's memory that nobody else has."""
    return torch.cuda.mem_get_info(device)[0] / 2**30


def release(device: torch.device) -> None:
    """Gives back what nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def planned(size: str, peer: str, device: torch.device) -> list[int]:
    """Those of `BATCHES` at which a peer's training step is thought to fit, and the smallest."""
    room = USABLE * memory_gib(device)
    return [batch for batch in BATCHES if kept_gib(size, peer, batch) <= room or batch == BATCHES[-1]]


def own_most(size: str, peer: str, device: torch.device) -> list[int]:
    """Batches, multiples of an eighth of the smallest of `BATCHES`, around the most that a peer is thought to have room for."""
    step = BATCHES[-1] // 8 or 1
    most = int(USABLE * memory_gib(device) / kept_gib(size, peer, step))
    return [step * n for n in range(max(1, min(most, 2 * BATCHES[0] // step)), 0, -3)]


class Measurement:
    """Peers side by side, on one device and dtype."""

    def __init__(self, device: torch.device, dtype: str, save: Callable[[list[dict]], None]) -> None:
        """save: called with the new rows whenever there are some."""
        self.device, self.dtype, self._save = device, dtype, save
        self.peers = {peer.name: peer for peer in all_peers(device, "triton")}
        self._ceiling = ceilings(device, DTYPES[dtype])
        release(device)

    def largest(self, workload: Workload, names: tuple[str, ...], mode: str, batches: list[int]) -> None:
        """Measures at the first of `batches` at which the first peer has room; what had none is a row."""
        for batch in batches:
            rows = self.measure(workload._replace(batch=batch), names, mode)
            if rows[0].get("reason") != OUT_OF_MEMORY:
                break

    def measure(self, workload: Workload, names: tuple[str, ...], mode: str) -> list[dict]:
        """A row for each peer: with its times, or the reason why there are none."""
        before, rows = conditions(self.device), []
        judge = Judge(workload, self.peers["published"], self.device)
        release(self.device)
        time = self._in_turn if mode in POOLED else self._together
        chosen = [peer for peer in map(self.peers.get, names) if workload.concerns(peer)]
        flops, size = floors.totals(workload.kernels())
        least = floors.milliseconds(workload.kernels(), self._ceiling)
        for name, found in time(workload, chosen, mode, judge):
            row = workload._asdict() | {"peer": name, "mode": mode, "ceiling": self._ceiling}
            row["conditions"] = [before, conditions(self.device)]
            if isinstance(found, str):
                rows.append(row | {"reason": found})
            else:
                rows.append(row | found(least) | {"flops": flops, "bytes": size, "floor_ms": least})
        self._save(rows)
        release(self.device)
        return rows

    def _ready(self, workload: Workload, peer: Peer, mode: str, judge: Judge):
        """What `make_ready` gives, or the reason why it gives nothing."""
        try:
            return make_ready(workload, peer, mode, self.device, judge)
        except torch.OutOfMemoryError:
            return OUT_OF_MEMORY
        except Exception as error:  # whatever keeps a peer from running is a row, not the end of the step
            return " ".join(f"{type(error).__name__}: {error}".split())[:300]

    def _together(self, workload: Workload, peers: list[Peer], mode: str, judge: Judge) -> Iterator[tuple]:
        ready = {}
        for peer in peers:
            made = ready[peer.name] = self._ready(workload, peer, mode, judge)
            release(self.device)
            if made == OUT_OF_MEMORY and peer is peers[0]:
                yield peer.name, made
                return
        running = {name: made.step for name, made in ready.items() if not isinstance(made, str)}
        between = torch.cuda.empty_cache if self.device.type == "cuda" else None
        try:
            times = interleave(running, self.device, SECONDS * len(running), between=between) if running else {}
        except torch.OutOfMemoryError:
            yield from ((peer.name, OUT_OF_MEMORY) for peer in peers)
            return
        for name, made in ready.items():
            yield name, partial(result, workload, made, times[name]) if name in times else made

    def _in_turn(self, workload: Workload, peers: list[Peer], mode: str, judge: Judge) -> Iterator[tuple]:
        samples: dict[str, list[float]] = {peer.name: [] for peer in peers}
        last = {}
        for _ in range(ROUNDS):
            for peer in peers:
                if isinstance(last.get(peer.name), str):
                    continue
                made = self._ready(workload, peer, mode, judge)
                if not isinstance(made, str):
                    time = interleave({peer.name: made.step}, self.device, SECONDS / ROUNDS, least_rounds=3)
                    samples[peer.name].append(time[peer.name].median)
                    made = made._replace(step=None)  # with which its memory goes
                last[peer.name] = made
                release(self.device)
        for name, made in last.items():
            time: Timing | None = quartiles(samples[name]) if samples[name] else None
            yield name, made if isinstance(made, str) else partial(result, workload, made, time)
