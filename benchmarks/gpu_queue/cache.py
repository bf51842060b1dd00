"""Triton's cache where a machine is bare at every call: one small file, any folder, no kernel compiled twice.

Set TRITON_CACHE_MANAGER to gpu_queue.cache:SharedCache (`environment` does) and every process that shares the folder waits
for the one that compiles a kernel instead of compiling it too, and finds files by where they are, not by the absolute paths
that Triton notes down. `pack` keeps what a launch needs, the machine code, its description and the launcher that triton 3.6
has gcc make, so that some hundred kernels fit in a few MB.
"""

from __future__ import annotations

import fcntl
import os
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from triton.runtime.cache import FileCacheManager

GROUP = (".cubin", ".json", ".ptx", ".ttgir", ".ttir", ".llir", ".source")
"""What a kernel is given back as, by the ends of names, where it is there."""
KEPT = (".cubin", ".json", ".so")
"""What a packed cache has of it."""
LIMIT = 15 * 2**20
"""Bytes of a packed cache; beyond them the kernels that were made first are left out."""
PATIENCE = 60.0
"""Seconds that another process is given to compile a kernel, before it is compiled here too."""


class SharedCache(FileCacheManager):
    """Triton's cache of files with one compilation of every kernel, over all processes, and no absolute paths."""

    _claim = None

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Paths by name of what belongs to a kernel. None: whoever asked is the one to compile it, and others wait."""

        def look() -> dict[str, str] | None:
            if not self.has_file(f"__grp__{filename}") or not self.has_file(filename):
                return None
            files = (path for path in Path(self.cache_dir).iterdir() if path.suffix in GROUP)
            return {path.name: str(path) for path in files if not path.name.startswith("__grp__")}

        return self._found_or_claimed(look)

    def get_file(self, filename: str) -> str | None:
        """The path of a file, or None; of a launcher as `get_group`."""
        look = partial(super().get_file, filename)
        return self._found_or_claimed(look) if filename.endswith(".so") else look()

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        path = super().put_group(filename, group)
        self._release()
        return path

    def put(self, data, filename: str, binary: bool = True) -> str:
        path = super().put(data, filename, binary)
        if filename.endswith(".so"):
            self._release()
        return path

    def _found_or_claimed(self, look: Callable):
        found, end = look(), time.monotonic() + PATIENCE
        if found is not None or self.lock_path is None:
            return found
        self._claim = open(self.lock_path, "w")  # noqa: SIM115  held until what is missing is there
        while time.monotonic() < end:
            try:
                fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
        found = look()
        if found is not None:
            self._release()
        return found

    def _release(self) -> None:
        """Lets others look; the system does the same when the process ends, however it ends."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None


def environment(folder: Path) -> dict[str, str]:
    """What processes need in their environment to share the cache in `folder`; this module must be on their path."""
    return {"TRITON_CACHE_DIR": str(folder), "TRITON_CACHE_MANAGER": "gpu_queue.cache:SharedCache"}


def kernels(folder: Path) -> set[str]:
    """The keys of all that is compiled in `folder`."""
    return {path.parent.name for path in folder.glob("*/*") if path.suffix in (".cubin", ".so")}


def pack(folder: Path, archive: Path) -> None:
    """Writes what launches need of the cache in `folder` to `archive`, in one step, newest first and no more than fits."""
    entries = [folder / key for key in kernels(folder)]
    entries.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    temporary = archive.with_suffix(f".{os.getpid()}.tmp")
    while True:
        with tarfile.open(temporary, "w:xz", preset=1) as tar:
            for path in (path for entry in entries for path in sorted(entry.iterdir()) if path.suffix in KEPT):
                tar.add(path, f"{path.parent.name}/{path.name}")
        if temporary.stat().st_size <= LIMIT:
            break
        entries = entries[: len(entries) * 3 // 4]
    temporary.replace(archive)


def unpack(archive: Path, folder: Path) -> None:
    """The cache of `archive`, if there is one, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if archive.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
