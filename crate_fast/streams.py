"""What a command prints to: nobody who reads, or a full disk, ends what the command does."""

from __future__ import annotations

import errno
import io
import os
import sys

UNHEARD = (errno.EPIPE, errno.EBADF, errno.ECONNRESET)  # whoever read has gone, which is nobody's mistake


class Steadfast(io.FileIO):
    """A file to print to that takes everything; `failed` is why something is lost, unless nobody wanted it."""

    failed: OSError | None = None

    def write(self, data) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in UNHEARD:
                self.failed = error
            return memoryview(data).nbytes


def keep_printing() -> list[Steadfast]:
    """Has this process print to `Steadfast` files; those, which are none where something else stands for stdout and stderr.

    The numbers 0 to 2 are taken if they were closed, or the next file that is opened would be printed into.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    files = []
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):
            continue
        file = Steadfast(number, "w", closefd=False)
        options = {"encoding": "utf-8", "errors": "backslashreplace", "line_buffering": True}
        if before is not None:
            before.flush()
            options = {option: getattr(before, option) for option in options}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(file), **options))
        files.append(file)
    return files
