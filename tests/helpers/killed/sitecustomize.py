"""Imported by every Python process that has this folder on its path; ends it, as SIGKILL does, inside the writing of a file.

KILL_INSIDE is "PATTERN MOMENT NUMBER": the NUMBER-th time that MOMENT comes for a file whose name matches PATTERN.

    open      before it is opened to be written
    torn      the same, with half a line added to it, as a line is written that is longer than a page
    half      as it is flushed, with the half of it that was written last not there yet
    whole     before it is flushed to the disk
    flushed   after that
    rename    before it is renamed to its name
    renamed   after that
    remove    before it is removed
"""

import fnmatch
import os
import signal
import sys

PATTERN, MOMENT, NUMBER = os.environ.get("KILL_INSIDE", "- - 0").split(" ")
left = int(NUMBER)
fsync, rename, replace = os.fsync, os.rename, os.replace


def reached(moment: str, path) -> bool:
    """Counts; whether this is the time."""
    global left
    name = os.path.basename(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
    if moment != MOMENT or not fnmatch.fnmatch(name, PATTERN):
        return False
    left -= 1
    return left == 0


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def audited(event: str, arguments: tuple) -> None:
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        if reached("open", arguments[0]):
            end()
        if reached("torn", arguments[0]):
            descriptor = os.open(arguments[0], os.O_WRONLY | os.O_APPEND)
            os.write(descriptor, b'{"split": "train", "ste')
            end()
    if (event == "os.rename" and reached("rename", arguments[1])) or (event == "os.remove" and reached("remove", arguments[0])):
        end()


def flush(descriptor) -> None:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    path = os.readlink(f"/proc/self/fd/{number}")
    if reached("half", path):
        os.ftruncate(number, os.fstat(number).st_size // 2)
        end()
    if reached("whole", path):
        end()
    fsync(descriptor)
    if reached("flushed", path):
        end()


def renaming(function):
    def call(source, target, **options) -> None:
        function(source, target, **options)
        if reached("renamed", target):
            end()

    return call


if left:
    sys.addaudithook(audited)
    os.fsync, os.rename, os.replace = flush, renaming(rename), renaming(replace)
