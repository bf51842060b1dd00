"""What `gpu.py` runs, in order of worth: steps of at most two minutes, compiled peers four, each with what it must wait for.

A step's `seconds` are its limit; `estimate` is what it is thought to take, from the number of kernels it is the first to
compile (2.1 seconds of a core each, counted where this was written) and a guess at its work. No step has run on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

from crate_fast.model import SIZES

SECONDS_A_KERNEL = 2.1
SHARDS = 6
"""Parts in which the tests marked "gpu" are run, so that none takes long."""
PUBLISHED_BYTES = (24.96, 6.1)
"""What the published code keeps for backward in bfloat16, of an image and a layer: of each value of a token, and of each entry
of attention. By shapes: 38.3, 64.9, 75.7 and 199 GiB at 1,024 images of the four sizes were counted, and these give 1.5% less
to more."""
USABLE = 0.93
"""Part of a GPU's memory that a step is planned to fill with what is kept for backward; the rest is for what is not."""


def kept_gib(size: str, peer: str, batch: int) -> float:
    """What a training step of `batch` images in 16 bit keeps for backward: crate_fast four activations a layer."""
    dim, depth, heads = (SIZES[size][name] for name in ("dim", "depth", "heads"))
    token, entry = (4 * 2, 0) if peer == "crate_fast" else PUBLISHED_BYTES
    return (token * dim + entry * heads * 197) * 197 * depth * batch / 2**30


class Step(NamedTuple):
    """One entry of the results.

    kind: what runs it (`kinds.KINDS`); options: its arguments; needs: names of steps that must have passed before, with
    these kernels on this architecture; kernels: how many it is the first to compile; work: seconds beside that.
    """

    name: str
    kind: str
    options: dict
    needs: tuple[str, ...] = ()
    kernels: int = 0
    work: float = 20.0
    seconds: float = 120.0

    def estimate(self, workers: int) -> float:
        """Seconds where tests run in so many processes; the other steps compile one kernel after the other."""
        return min(self.seconds, self.work + self.kernels * SECONDS_A_KERNEL / (workers if self.kind == "tests" else 1))

    def memory(self) -> str:
        """GiB that the largest peer keeps for backward, of those that are more than a few."""
        if self.kind not in ("train", "alone"):
            return "small"
        size, peer = self.options["size"], self.options.get("peer", "published")
        return f"{kept_gib(size, peer, 1024):.0f} at 1024"


def queue(shards: int = SHARDS) -> list[Step]:
    """All steps, the most valuable first; the tests in so many parts."""
    tests = [Step(f"tests {n + 1}/{shards}", "tests", {"shard": f"{n}/{shards}"}, (), 660 // shards, 60) for n in range(shards)]
    whole = tuple(step.name for step in tests)
    return [
        Step("parity tiny", "parity", {"size": "tiny"}, kernels=24, work=25),
        *_trained("tiny"),
        Step("inference tiny", "inference", {"size": "tiny", "modes": ["eager"]}, ("parity tiny",), 12, 30),
        Step("layer and operations tiny", "operations", {"size": "tiny"}, ("parity tiny",), 6, 60),
        Step("parity base", "parity", {"size": "base"}, ("parity tiny",), 2, 25),
        *_trained("base"),
        *tests,
        Step("graph tiny", "train", {"size": "tiny", "modes": ["cuda graph"]}, ("parity tiny", *whole), 0, 50),
        Step("inference graphs tiny", "inference", {"size": "tiny", "modes": ["cuda graph"]}, ("parity tiny", *whole), 0, 40),
        Step("precision", "precision", {}, ("parity tiny",), 8, 60),
        Step("tune tiny", "tune", {"size": "tiny"}, whole, 0, 50),
        Step("train tiny tuned", "train", {"size": "tiny", "modes": ["eager"]}, ("tune tiny",), 0, 45),
        Step("compiled tiny", "train", {"size": "tiny", "modes": ["compiled"]}, ("parity tiny",), 0, 200, 240),
        Step("photographs", "loop", {"size": "tiny", "packs": False}, ("parity tiny",), 0, 45),
        Step("packs", "loop", {"size": "tiny", "packs": True}, ("parity tiny",), 0, 45),
        Step("tune base", "tune", {"size": "base"}, whole, 0, 70),
        Step("train base tuned", "train", {"size": "base", "modes": ["eager"]}, ("parity base", "tune base"), 0, 70),
        Step("compiled base", "train", {"size": "base", "modes": ["compiled"]}, ("parity base",), 0, 220, 240),
        *(step for size in SIZES if size not in ("tiny", "base") for step in (_parity(size), *_trained(size))),
        Step("tune small", "tune", {"size": "small"}, whole, 20, 60),
        Step("tune large", "tune", {"size": "large"}, whole, 0, 80),
    ]


def _parity(size: str) -> Step:
    return Step(f"parity {size}", "parity", {"size": size}, (), 20, 35)


def _trained(size: str) -> list[Step]:
    """Training eager: beside the others at the most that the largest takes, ours at 1,024, published at its own most."""
    needs = (f"parity {size}",)
    return [
        Step(f"train {size}", "train", {"size": size, "modes": ["eager"]}, needs, 0, 45),
        Step(f"ours alone {size}", "alone", {"size": size, "peer": "crate_fast"}, needs, 0, 25),
        Step(f"published alone {size}", "alone", {"size": size, "peer": "published"}, needs, 0, 30),
    ]
