"""Mutations of files, and a process of its own for what reads them: for test_fuzz.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

SECONDS, MEMORY = 20, 2 << 30  # what a command may take for a small file, whatever is in it
NUMBERS = (0, -1, 1, 255, 2**31, 2**32 - 1, 2**63, -(2**63), 10**400, 1e308, -1e-308, float("nan"), float("inf"))
VALUES = (*NUMBERS, "", "x" * 100_000, "\ud800", "../../../etc/passwd", None, True, [], {}, [[]] * 1000, {"a": {"b": {"c": 1}}})


class Outcome(NamedTuple):
    """How a command ended."""

    status: int | None  # None: it was ended, for its time or by a signal
    err: str
    seconds: float
    bytes: int  # of memory, at most


def run_alone(argv: list[str], place: Path) -> Outcome:
    """`crate-fast argv` in a process forked from this one, in `place`."""
    err, start = place / "stderr", time.monotonic()
    before = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # data and stack, all private
    child = os.fork()
    if child == 0:
        _child(argv, err, before)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(None if code < 0 else code, err.read_text(errors="replace"), time.monotonic() - start, usage.ru_maxrss << 10)


def _child(argv: list[str], err: Path, before: int) -> None:
    code = 70
    try:
        signal.alarm(SECONDS)
        sys.stdout = io.StringIO()
        resource.setrlimit(resource.RLIMIT_DATA, (before + MEMORY, before + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(err, "w", errors="backslashreplace") as file, contextlib.redirect_stderr(file):
            code = _status_of(argv)
    finally:
        os._exit(code)


def _status_of(argv: list[str]) -> int:
    import traceback

    from crate_fast.cli import main

    try:
        return main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 70


def change_bytes(content: bytes, draw) -> bytes:
    """Bits turned, bytes put in, taken out or doubled, the end cut off."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(changed) + 1), draw.choice((1, 1, 2, 8, 100, 10_000))
        kind = draw.choice(("flip", "put", "take", "double", "cut", "number"))
        if kind == "flip" and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == "put":
            changed[at:at] = draw.randbytes(length)
        elif kind == "take":
            del changed[at : at + length]
        elif kind == "double":
            changed[at:at] = changed[max(0, at - length) : at]
        elif kind == "cut" and draw.random() < 0.3:
            del changed[at:]
        elif kind == "number":
            changed[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"))
    return bytes(changed)


def change_json(content: bytes, draw) -> bytes:
    """A value of JSON is another, a key is gone, doubled or new; sometimes the bytes are changed instead."""
    if draw.random() < 0.3:
        return change_bytes(content, draw)
    lines = content.decode().splitlines() if content.count(b"}\n{") else [content.decode()]
    at = draw.randrange(len(lines))
    value = json.loads(lines[at])
    _change_value(value, draw)
    lines[at] = json.dumps(value)
    return "\n".join(lines).encode(errors="surrogatepass") + b"\n"


def _change_value(value, draw) -> None:
    while isinstance(value, dict | list) and value:
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        if isinstance(value[key], dict | list) and value[key] and draw.random() < 0.7:
            value = value[key]
            continue
        kind = draw.choice(("other", "other", "gone", "new"))
        if kind == "other":
            value[key] = draw.choice(VALUES)
        elif kind == "gone":
            del value[key]
        elif isinstance(value, dict):
            value[draw.choice(("", "no such key", "__class__", "\ud800"))] = draw.choice(VALUES)
        return


def change_tensors(content: bytes, draw) -> bytes:
    """safetensors: the header's JSON or its length is changed, or any bytes."""
    length = int.from_bytes(content[:8], "little")
    kind = draw.choice(("header", "header", "length", "bytes"))
    if kind == "bytes":
        return change_bytes(content, draw)
    if kind == "length":
        return draw.choice((0, 1, length + 1, length - 1, 2**40, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    header = change_json(content[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def change_archive(content: bytes, draw) -> bytes:
    """torch.save: another pickle, or a changed one, with right checksums; records gone, cut or doubled; or any bytes."""
    kind = draw.choice(("pickle", "pickle", "hostile", "record", "bytes"))
    if kind == "bytes":
        return change_bytes(content, draw)
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(changed, "w") as target:
        names = source.namelist()
        odd = draw.choice(names)
        for name in names:
            data = source.read(name)
            if name.endswith("data.pkl") and kind != "record":
                data = draw.choice(hostile_pickles()) if kind == "hostile" else change_pickle(data, draw)
            elif name == odd and kind == "record":
                if draw.random() < 0.3:
                    continue
                data = draw.choice((b"", data[: len(data) // 2], data * 2, bytes(len(data))))
            target.writestr(name, data)
    return changed.getvalue()


def change_pickle(data: bytes, draw) -> bytes:
    """Few bytes of a pickle, so that much of it is still read."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        changed[draw.randrange(len(changed))] = draw.choice(
            (*b"\x80.)]}(RcbtuseaqrhjJKMGXUBCVNI0123456789", draw.randrange(256))
        )
    return bytes(changed)


class _Command:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['FUZZ_CANARY']}",)


def hostile_pickles() -> list[bytes]:
    """That would run code, take memory, nest deeply or never end."""
    call = f"cos\nsystem\n(S'touch {os.environ['FUZZ_CANARY']}'\ntR.".encode()
    return [
        pickle.dumps(_Command()), call, b"\x80\x02" + call, b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x02Nr\xff\xff\xff\x7f.", b"(" * 500_000 + b".",
        b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02X\xff\xff\xff\x7fabc.", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", b"I" + b"9" * 200_000 + b"\n.",
        b"\x80\x02cnumpy\nndarray\n(K\x01tR.", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(tt)tR.", b"", b".",
        b"\x80\x02c__builtin__\neval\nX\x03\x00\x00\x001+1\x85R.", b"\x80\x02ccollections\nOrderedDict\n)R}q\x00h\x00s.",
    ]  # fmt: skip


class Kind(NamedTuple):
    """A kind of file that commands read."""

    file: str  # within the sample, which is copied whole for every case
    change: object  # (content, random numbers) -> content
    commands: tuple[tuple[str, ...], ...]  # "{}": the copy


def case(sample: Path, kind: Kind, draw, place: Path) -> tuple[tuple[str, ...], Outcome]:
    """A copy of `sample` in `place`, one file of it changed, and a command that reads it: (the command, its outcome)."""
    copy = place / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sample, copy, symlinks=True)
    file = copy / kind.file
    content = kind.change(file.read_bytes(), draw)
    file.unlink()
    file.write_bytes(content)
    command = draw.choice(kind.commands)
    return command, run_alone([word.replace("{}", str(copy)) for word in command], place)
