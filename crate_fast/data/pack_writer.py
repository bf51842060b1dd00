"""From a folder of photographs to packs: what goes into which pack is known before the first is written.

A folder's files are sorted and cut into packs of as many images each, so that a pack is a function of its files and the
settings alone. A pack that has its name is whole; what was killed goes on with the packs that are missing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import as_bytes, parse_json, write_atomically
from ..locks import lock, unlock
from ..settings import ConfigError
from .folder import Photographs, open_folder
from .pack_encoding import Settings, encode
from .pack_file import Encoded, Pack, PackError, Unreadable, write_pack
from .pack_folder import MANIFEST, SETTINGS, open_listed
from .pictures import READER, READER_ENTRY

UNREADABLE = "unreadable.txt"
SAMPLED = 32  # images of a split that tell how large the rest will be
MARGIN = 1.02
PATIENCE = 5.0  # seconds
IMAGENET = {"train": 1_281_167, "val": 50_000}
IMAGENET_CLASSES = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"  # SHA-256 of the sorted names, by lines


class Job(NamedTuple):
    """A pack to be written: its path, its images with their names and labels."""

    path: Path
    files: list[tuple[str, str, int]]
    lossless: bool


class Done(NamedTuple):
    """What a folder of packs has become: images and packs of each split, its bytes, images left out."""

    images: dict[str, int]
    packs: int
    size: int
    unreadable: list[Unreadable]


def prepare(source: Path, target: Path, settings: Settings, workers: int) -> Done:
    """Packs the folder `source` (train/ and val/, a folder per class in each) in `target`, or what is missing there of it.

    Raises:
        ConfigError: `source` is no such folder, `target` holds something else, the disk has too little space.
        OSError: a file cannot be written.
    """
    *stores, classes = open_folder(source, "SRC")
    splits: dict[str, Photographs] = dict(zip(("train", "val"), stores, strict=True))
    _check_target(target, source)
    target.mkdir(parents=True, exist_ok=True)
    _lock(target)
    try:
        _take(target, source, settings, splits)
        return _prepare(source, target, splits, classes, settings, workers)
    finally:
        unlock()


def _lock(target: Path) -> None:
    """Keeps others out of the folder; what a killed command leaves behind holds it for a moment yet."""
    end = time.monotonic() + PATIENCE
    while not lock(target):
        if time.monotonic() > end:
            raise ConfigError(f"{target}: another prepare is in it")
        time.sleep(0.05)


def _prepare(source: Path, target: Path, splits: dict, classes: list[str], settings: Settings, workers: int) -> Done:
    jobs = {split: _plan(source, target, split, store, settings) for split, store in splits.items()}
    for line in count_warnings(classes, {split: len(store) for split, store in splits.items()}):
        print(f"crate-fast: warning: {line}", file=sys.stderr)
    listed = _listed(target)
    missing = {split: [job for job in jobs[split] if not _is_there(job.path, listed.get(job.path.name))] for split in jobs}
    _check_space(target, missing, settings)
    _write_all([*missing["train"], *missing["val"]], settings, workers)
    return _finish(target, jobs, classes, settings)


def count_warnings(classes: list[str], counts: dict[str, int]) -> list[str]:
    """A line for each split whose images are not as many as ImageNet has, where the classes are ImageNet's 1,000."""
    if hashlib.sha256(as_bytes("\n".join(classes))).hexdigest() != IMAGENET_CLASSES:
        return []
    return [
        f"the classes are ImageNet's, and {split} has {counts[split]:,} images; ImageNet has {count:,}"
        for split, count in IMAGENET.items()
        if counts[split] != count
    ]


def _check_target(target: Path, source: Path) -> None:
    """Raises ConfigError where packs have no place."""
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"DST is {target}, which lies in SRC, {source}")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"DST is {target}, which is a file")
    if target.is_dir() and not (target / SETTINGS).is_file() and any(not _is_left_over(path) for path in target.iterdir()):
        raise ConfigError(f"DST is {target}, which is not empty and has no {SETTINGS}: packs need a folder of their own")


def _take(target: Path, source: Path, settings: Settings, splits: dict[str, Photographs]) -> None:
    """Makes `target` the place of packs of these files with these settings, unless it is that already."""
    for path in target.iterdir():
        if _is_left_over(path):
            path.unlink()
    names = hashlib.sha256()
    for split, store in splits.items():
        names.update(as_bytes("".join(f"{split} {_name(store, i, source)}\n" for i in range(len(store)))))
    ours = asdict(settings) | {"files": names.hexdigest(), READER_ENTRY: READER}
    if not (target / SETTINGS).is_file():
        text = json.dumps(ours, indent=2) + "\n"
        write_atomically(target / SETTINGS, lambda file: file.write(text.encode()))
    _check_same(target / SETTINGS, ours)


def _check_same(path: Path, ours: dict) -> None:
    try:
        theirs = {"reader": 1} | parse_json(path.read_text(encoding="utf-8"))
        differing = [name for name in ours if theirs[name] != ours[name]]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: damaged ({error}); packs need a folder of their own") from error
    if "reader" in differing:
        raise ConfigError(
            f"{path.parent} was begun before images of 16 bits, transparent and turned ones were read as they are now, hidden "
            "files left out and links followed; packs that are whole go on serving, others need a folder of their own"
        )
    if "files" in differing:
        raise ConfigError(f"{path.parent} was begun with other files than SRC has now; they need a folder of their own")
    for name in differing:
        raise ConfigError(
            f"--{name.replace('_', '-')} is {ours[name]}; {path.parent} was begun with {theirs[name]}, which the rest keeps"
        )


def _is_left_over(path: Path) -> bool:
    """Whether a killed process left it half written."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _name(store: Photographs, index: int, source: Path) -> str:
    return os.path.relpath(store.place(index), source)


def _plan(source: Path, target: Path, split: str, store: Photographs, settings: Settings) -> list[Job]:
    """The packs of a split."""
    jobs = []
    for number, first in enumerate(range(0, len(store), settings.pack_images)):
        chosen = range(first, min(first + settings.pack_images, len(store)))
        files = [(store.place(index), _name(store, index, source), store.label(index)) for index in chosen]
        jobs.append(Job(target / f"{split}-{number:05d}.pack", files, lossless=split == "val"))
    return jobs


def _listed(target: Path) -> dict[str, int]:
    """The packs' checksums by their names, where they were all written before."""
    if not (target / MANIFEST).is_file():
        return {}
    try:
        manifest = parse_json((target / MANIFEST).read_text(encoding="utf-8"))
        return manifest["train"]["packs"] | manifest["val"]["packs"]
    except (KeyError, TypeError, ValueError):
        return {}  # it is written anew


def _is_there(path: Path, checksum: int | None) -> bool:
    """Whether a pack is written, with this checksum if it is known; one that is damaged, or another, is written anew."""
    if not path.exists():
        return False
    try:
        Pack(path) if checksum is None else open_listed(path, checksum)
    except PackError as error:
        print(f"crate-fast: warning: {error}; it is written anew", file=sys.stderr)
        return False
    return True


def _check_space(target: Path, missing: dict[str, list[Job]], settings: Settings) -> None:
    """Says how much will be written and how much is free; raises ConfigError where that is too little."""
    needed = sum(_estimate(jobs, settings) for jobs in missing.values())
    free = shutil.disk_usage(target).free
    if needed:
        print(f"about {in_words(needed)} to write; {in_words(free)} are free in {target}", flush=True)
    if needed * MARGIN > free:
        raise ConfigError(f"DST is {target}, where {in_words(free)} are free; about {in_words(needed * MARGIN)} are needed")


def in_words(size: float) -> str:
    """Bytes as GB, or as MB where they are few."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _estimate(jobs: list[Job], settings: Settings) -> float:
    """Bytes of the packs to be written, from a sample of their images."""
    files = [(*file, job.lossless) for job in jobs for file in job.files]
    sample = [files[int(place)] for place in np.linspace(0, len(files) - 1, min(SAMPLED, len(files))).astype(int)]
    sizes = [len(image.content) for image in (encode(*file, settings) for file in sample) if isinstance(image, Encoded)]
    return sum(sizes) / max(1, len(sizes)) * len(files)


def _write_all(jobs: list[Job], settings: Settings, workers: int) -> None:
    """Writes packs in `workers` processes, the number of images so far in a bar."""
    from ..bar import Bar

    if not jobs:
        return
    context = multiprocessing.get_context("fork")
    count = context.Value("q", 0)  # images so far; negative: stop
    workers, total = min(workers, len(jobs)), sum(len(job.files) for job in jobs)
    bar = Bar(total)
    with bar, ProcessPoolExecutor(workers, context, _start_worker, (count, settings)) as pool:
        left = {pool.submit(_write_one, job) for job in jobs}
        try:
            while left:
                done, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(count.value - bar.n)
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                f"--workers is {workers}: one was ended from outside, for want of memory perhaps; the same command goes on"
            ) from error
        finally:
            if left:
                count.value = -total - 1
                pool.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """What a process that packs was started with."""

    count: Any = None
    settings: Settings


def _start_worker(count, settings: Settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the command itself acts on it
    unlock()
    _Worker.count, _Worker.settings = count, settings
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        assert parent is not None  # this is a worker
        wait_for_end([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _write_one(job: Job) -> None:
    write_pack(job.path, _counted(job))


def _counted(job: Job) -> Iterator[Encoded | Unreadable]:
    for path, name, label in job.files:
        yield encode(path, name, label, job.lossless, _Worker.settings)
        with _Worker.count.get_lock():
            _Worker.count.value += 1
            if _Worker.count.value < 0:
                raise ConfigError("stopped")


def _finish(target: Path, jobs: dict[str, list[Job]], classes: list[str], settings: Settings) -> Done:
    """Writes what lists the packs, once all are there."""
    packs = {split: [Pack(job.path) for job in jobs[split]] for split in jobs}
    images = {split: sum(map(len, packs[split])) for split in packs}
    unreadable = [entry for split in packs for pack in packs[split] for entry in pack.unreadable]
    for split, count in images.items():
        if not count:
            raise ConfigError(f"SRC: not one image of {split} can be read; the first: {': '.join(unreadable[0])}")
    text = "".join(f"{entry.name}\t{entry.reason}\n" for entry in unreadable)
    write_atomically(target / UNREADABLE, lambda file: file.write(as_bytes(text)))
    checksums = {split: {pack.path.name: pack.checksum for pack in packs[split]} for split in packs}
    content = {split: {"images": images[split], "packs": checksums[split]} for split in packs}
    manifest = json.dumps({"settings": asdict(settings), "classes": classes, **content}, indent=1) + "\n"
    write_atomically(target / MANIFEST, lambda file: file.write(manifest.encode()))
    size = sum(pack.path.stat().st_size for split in packs for pack in packs[split])
    return Done(images, sum(map(len, jobs.values())), size, unreadable)
