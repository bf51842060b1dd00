"""Mutates every kind of file that a command reads and runs the command on it: a line or a result, and nothing else.

    python tests/fuzz.py                 # an hour, each case its own seed; `make fuzz` does it too
    python tests/fuzz.py --minutes 5     # or so long; --seed N begins elsewhere, --kinds image pack takes only these
    python tests/fuzz.py --case image 17 # one case again, with what it printed

Every case is a process of its own, forked from one that has imported everything. Wrong are: a traceback, a status that is
neither success nor 2, more than one line of error, a file made or a program started by what was read, more than 2 GB, 20 s.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes share no threads

import mutations
import numpy as np
import torch
from PIL import Image

from crate_fast import CRATE
from crate_fast.checkpoint.distributed import STATE, TABLE, checksum
from crate_fast.commands.main import USER_ERRORS, main
from crate_fast.data.pack_file import HEADER, INDEX

MEMORY = 2 << 30
SECONDS = 20
BLOCKED = 120  # seconds of one that does nothing: it waits for what does not come
STOPPED = 5  # seconds after which a run that was only asked to be long is told to stop
SIZES = ["--image-size", "16", "--patch-size", "8", "--dim", "16", "--depth", "1", "--heads", "1", "--dim-head", "16"]
QUICK = [*SIZES, "--device", "cpu", "--batch-size", "4", "--workers", "0", "--num-threads", "1"]
STEP = "run/checkpoints/step-00000002.pt"
PARTS = "parts/checkpoints/step-00000002.dcp"
FORMATS = {"jpg": {}, "png": {}, "gif": {}, "bmp": {}, "tiff": {}, "webp": {}, "ppm": {}, "jpeg": {"progressive": True}}
EVALUATE = ["--data", "folder", "--device", "cpu", "--workers", "0", "--batch-size", "4"]


class Kind(NamedTuple):
    """A kind of file: which folders its commands need, how they are changed, and the commands, of which a case draws one.

    asked: the file says what to do, as a recipe does, and may ask for much: it may run out of memory, or be told to stop.
    """

    needs: tuple[str, ...]
    change: Callable[[Random, Path], None]
    commands: list[list[str]]
    asked: bool = False


def in_file(name: str, change: Callable[[Random, bytes], bytes]) -> Callable[[Random, Path], None]:
    """A change of the file `name` by its contents."""

    def apply(random: Random, here: Path) -> None:
        path = here / name
        path.write_bytes(change(random, path.read_bytes()))

    return apply


def change_pack(random: Random, here: Path) -> None:
    """Another list of packs, or another pack, whose own checksums and that in the list may be right all the same."""
    listed, path = here / "packs" / "packs.json", here / "packs" / random.choice(("train-00000.pack", "val-00000.pack"))
    if random.random() < 0.4:
        listed.write_bytes(mutations.change_json(random, listed.read_bytes()))
        return
    content = path.read_bytes()
    if random.random() < 0.4:
        path.write_bytes(mutations.change_bytes(random, content))
        return
    header = list(HEADER.unpack(content[: HEADER.size]))
    images, index, notes = content[64 : header[3]], content[header[3] : header[4]], content[header[4] :]
    rows = np.frombuffer(index, INDEX).copy()
    kind = random.choice(("row", "header", "notes", "image", "index"))
    if kind == "row":
        column = random.choice(rows.dtype.names)
        largest = np.iinfo(rows.dtype[column]).max
        rows[column][random.randrange(len(rows))] = random.choice((*mutations.NUMBERS[:4], 60_000, 2**31, largest)) % (
            largest + 1
        )
    images = mutations.change_bytes(random, images) if kind == "image" else images
    notes = mutations.change_json(random, notes) if kind == "notes" else notes
    index = mutations.change_bytes(random, index) if kind == "index" else rows.tobytes()
    header[6:8] = zlib.crc32(index), zlib.crc32(notes)
    header[5] = 64 + len(images) + len(index) + len(notes)
    if kind == "header":
        place = random.choice((1, 2, 3, 4, 5))
        header[place] = random.choice(mutations.NUMBERS[:9]) % 2 ** (32 if place < 3 else 64)
    start = HEADER.pack(*header)
    path.write_bytes(start + struct.pack("<I", zlib.crc32(start)) + images + index + notes)
    manifest = json.loads(listed.read_bytes())
    manifest[path.name.partition("-")[0]]["packs"][path.name] = zlib.crc32(start)
    listed.write_text(json.dumps(manifest))


def change_parts(random: Random, here: Path) -> None:
    """A file of a checkpoint in parts is another; its table may be, and its checksum right all the same."""
    folder = here / PARTS
    table, state = folder / TABLE, folder / STATE
    kind = random.choice(("table", "table", "pickle", "state", "bytes", "sums"))
    if kind == "bytes":
        path = random.choice(sorted(folder.iterdir()))
        path.write_bytes(mutations.change_bytes(random, path.read_bytes()))
        return
    if kind == "state":
        state.write_bytes(mutations.change_archive(random, state.read_bytes()))
        return
    if kind == "sums":
        path = random.choice(sorted(folder.glob("__*")))
        path.write_bytes(mutations.change_bytes(random, path.read_bytes()))
    elif kind == "table":
        table.write_bytes(_other_table(random, table.read_bytes()))
    else:
        table.write_bytes(mutations.change_pickle(random, table.read_bytes()))
    content = torch.load(state, weights_only=True)
    content["parts"] = {path.name: checksum(path) for path in folder.iterdir() if path.name != STATE}
    torch.save(content, state)


def _other_table(random: Random, content: bytes) -> bytes:
    """A table of parts one of whose values is another."""
    table = pickle.loads(content)
    holder = random.choice((table.state_dict_metadata, table.state_dict_metadata, table.storage_data, vars(table)))
    key = random.choice(sorted(holder, key=str))
    value = holder[key]
    if not hasattr(value, "__dict__") or random.random() < 0.2:
        holder[key] = mutations.odd_value(random, value)
        return pickle.dumps(table)
    while random.random() < 0.8:
        inner = random.choice(sorted(vars(value)))
        below = getattr(value, inner)
        below, place = (below[0], None) if isinstance(below, list) and below else (below, inner)
        if not hasattr(below, "__dict__") or isinstance(below, torch.Size):
            odd = mutations.odd_value(random, below)
            if isinstance(below, torch.Size):
                odd = random.choice((torch.Size([2**40]), torch.Size([-1, 4]), torch.Size([0]), torch.Size([]), (1, "x"), odd))
            odd = random.choice(("/etc/passwd", "../x", TABLE, odd)) if isinstance(below, str) else odd
            object.__setattr__(value, place or inner, odd)
            break
        value = below
    try:
        return pickle.dumps(table)
    except RuntimeError:  # a layout that PyTorch has no name for
        return mutations.change_bytes(random, content)


def change_picture(random: Random, here: Path) -> None:
    """An image of any format in place of one that is trained on and shown, changed."""
    for old in (here / "folder").rglob("00000.jpg"):
        old.unlink()
        source = random.choice(sorted((here / "images").iterdir()))
        content = mutations.change_image(random, source.read_bytes())
        (old.parent / source.name).write_bytes(content)
        (here / "x.png").write_bytes(content)


def change_recipe(random: Random, here: Path) -> None:
    """A recipe with other lines."""
    in_file("recipe.toml", mutations.change_lines if random.random() < 0.8 else mutations.change_bytes)(random, here)


RESUME = ["train", "--resume", "run"]
KINDS = {
    "config": Kind(
        ("run", "folder"),
        in_file("run/config.json", mutations.change_json),
        [RESUME, ["evaluate", "run"], ["train", "--recipe", "run/config.json", "--out", "new"]],
        asked=True,
    ),
    "metrics": Kind(("run", "folder"), in_file("run/metrics.jsonl", mutations.change_lines), [RESUME]),
    "checkpoint": Kind(
        ("run", "folder"),
        in_file(STEP, mutations.change_archive),
        [RESUME, RESUME, ["evaluate", STEP, *EVALUATE], ["convert", STEP, "x.safetensors"], ["train", "--resume", STEP]],
    ),
    "published": Kind(
        ("folder", "main.pth.tar"),
        in_file("main.pth.tar", mutations.change_archive),
        [
            ["evaluate", "main.pth.tar", *EVALUATE],
            ["convert", "main.pth.tar", "x.safetensors"],
            ["train", "--init", "main.pth.tar", "--data", "folder", "--out", "new", "--epochs", "1", *QUICK],
            ["inspect", "--checkpoint", "main.pth.tar", "--images", "folder/val", "--out", "views"],
        ],
    ),
    "legacy": Kind(
        ("folder", "legacy.t7"),
        in_file("legacy.t7", mutations.change_archive),
        [["evaluate", "legacy.t7", *EVALUATE], ["convert", "legacy.t7", "x.safetensors"]],
    ),
    "parts": Kind(
        ("parts", "folder"),
        change_parts,
        [["evaluate", PARTS, *EVALUATE], ["convert", PARTS, "x.pth.tar"], ["train", "--resume", "parts"]],
    ),
    "safetensors": Kind(
        ("run", "folder"),
        in_file("run/model.safetensors", mutations.change_safetensors),
        [
            ["evaluate", "run"],
            ["convert", "run/model.safetensors", "x.pth.tar"],
            ["train", "--init", "run", "--data", "folder", "--out", "new", "--epochs", "1", *QUICK],
            ["segment", "x.png", "--checkpoint", "run", "--out", "maps"],
        ],
    ),
    "recipe": Kind(
        ("folder", "recipe.toml"),
        change_recipe,
        [["train", "--recipe", "recipe.toml", "--out", "new"], ["finetune", "--recipe", "recipe.toml", "--out", "new"]],
        asked=True,
    ),
    "pack": Kind(
        ("run", "packs"),
        change_pack,
        [
            ["train", "--data", "packs", "--out", "new", "--epochs", "1", *QUICK],
            ["evaluate", "run", "--data", "packs", "--workers", "0"],
        ],
    ),
    "image": Kind(
        ("run", "folder", "images"),
        change_picture,
        [
            ["train", "--data", "folder", "--out", "new", "--epochs", "1", *QUICK],
            ["evaluate", "run", "--data", "folder"],
            ["segment", "x.png", "--checkpoint", "run", "--out", "maps"],
            ["inspect", "--checkpoint", "run", "--images", "folder/val", "--out", "views"],
            ["prepare", "imagenet", "folder", "new", "--raw", "--workers", "1"],
            ["prepare", "imagenet", "folder", "new", "--workers", "1"],
        ],
    ),
    "hub": Kind(("hub",), in_file("hub/config.json", mutations.change_json), [["from_pretrained", "hub"]]),
}


def make_corpus(here: Path) -> Path:
    """`here` with files of every kind, made by a process of its own: this one may not start the threads of a backward pass."""
    here.mkdir()
    process = os.fork()
    if not process:
        with _ending(), open(here / "log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.chdir(here)
            _fill(here)
            (here / "modules").write_text("\n".join(sys.modules))
    if os.waitpid(process, 0)[1]:
        raise RuntimeError(f"the files to begin with cannot be made: {(here / 'log').read_text()[-2000:]}")
    for module in (here / "modules").read_text().splitlines():  # here once, and not again in every case
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    return here


def _fill(here: Path) -> None:
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for index in range(count):
            path = here / "folder" / split / "ab"[index % 2]
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (20, 20, 3), np.uint8)).save(path / f"{index // 2:05d}.jpg")
    (here / "images").mkdir()
    for ending, options in FORMATS.items():
        Image.fromarray(draw.integers(0, 255, (20, 24, 3), np.uint8)).save(here / "images" / f"{ending}.{ending}", **options)
    for name, mode in (("grey", "L"), ("palette", "P"), ("alpha", "RGBA"), ("wide", "I;16")):
        Image.new(mode, (20, 20)).save(here / "images" / f"{name}.png")
    words = ["train", "--data", "folder", "--epochs", "2", *QUICK, "--checkpoint-every", "1", "--ema", "0.5"]
    assert main([*words, "--out", "run"]) == 0
    assert main([*words, "--out", "parts", "--strategy", "fsdp"]) == 0
    for run in ("run", "parts"):  # as they were after the first of two epochs
        for path in (here / run / "checkpoints").glob("*"):
            if "step-00000002" not in path.name:
                path.unlink() if not path.is_dir() or path.is_symlink() else shutil.rmtree(path)
    (here / "parts" / "model.safetensors").unlink()
    assert main(["prepare", "imagenet", "folder", "packs", "--workers", "1"]) == 0
    model = CRATE(image_size=16, patch_size=8, num_classes=2, dim=16, depth=1, heads=1, dim_head=16)
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    (here / "main.pth.tar").write_bytes(mutations.saved({"epoch": 3, "arch": "CRATE_tiny", "state_dict": weights}))
    (here / "legacy.t7").write_bytes(mutations.saved({"model": model.state_dict(), "acc": 50.0, "epoch": 3}, zipped=False))
    model.save_pretrained(here / "hub")
    assert main(["inspect", "--checkpoint", "run", "--images", "folder/val", "--out", "views"]) == 0
    settings = json.loads((here / "run" / "config.json").read_text())["config"]
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if value is not None and name != "out"]
    (here / "recipe.toml").write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def _ending():
    """Ends this process with what is done within, whatever happens: 70 after an exception, which is printed."""
    status = 70
    try:
        yield
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        print(traceback.format_exc(), flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 70)


def attempt(name: str, random: Random, corpus: Path, here: Path) -> tuple[str, str | None]:
    """Runs a case of the kind `name` in the new folder `here`: (how it ended, what is wrong with that or None)."""
    kind = KINDS[name]
    here.mkdir()
    for need in kind.needs:
        if (corpus / need).is_dir():
            shutil.copytree(corpus / need, here / need, symlinks=True)
        else:
            shutil.copyfile(corpus / need, here / need)
    if name == "safetensors":
        shutil.copyfile(corpus / "images" / "png.png", here / "x.png")
    kind.change(random, here)
    words = random.choice(kind.commands)
    process = os.fork()
    if not process:
        with _ending(), open(here / ".out", "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            os.chdir(here)
            _guard()
            sys.exit(_call(words))
    status, usage, seconds = _wait(process, kind.asked)
    text = (here / ".out").read_text(errors="replace")
    wrong = _judge(kind, status, usage, text) or ("code was run" if list(here.rglob(mutations.CANARY)) else None)
    return ("done" if status == 0 else "refused" if status == 2 else f"ended {status}"), wrong and (
        f"{wrong}: {' '.join(words)} ({seconds:.1f} s)\n{text[-1500:]}"
    )


def _guard() -> None:
    """Ends this process where it starts a program, which no command on these files does but `prepare`'s workers."""
    for number, stream in ((1, "stdout"), (2, "stderr")):
        raw = io.FileIO(number, "w", closefd=False)
        setattr(sys, stream, io.TextIOWrapper(raw, errors="backslashreplace", write_through=True))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def look(event: str, arguments: tuple) -> None:
        if event in ("os.system", "os.exec", "os.posix_spawn", "pty.spawn", "subprocess.Popen"):
            words = str(arguments)
            if "multiprocessing" not in words and "forkserver" not in words and "ldconfig" not in words:
                print(f"a program was started: {words[:300]}", flush=True)
                os._exit(71)

    sys.addaudithook(look)


def _call(words: list[str]) -> int:
    if words[0] != "from_pretrained":
        return main(words)
    try:
        CRATE.from_pretrained(words[1])
    except USER_ERRORS as error:
        print(f"crate-fast: error: {error}", file=sys.stderr)
        return 2
    return 0


def _busy(process: int) -> float:
    """The processor's seconds that a process has had: a machine that does other things too makes no case slow."""
    return sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def _wait(process: int, asked: bool) -> tuple[int, resource.struct_rusage, float]:
    """(status, what it used, seconds): the negative number of a signal where one ended it."""
    start, told = time.monotonic(), False
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        seconds = time.monotonic() - start
        if ended:
            return os.waitstatus_to_exitcode(status), usage, seconds
        if seconds > SECONDS and (_busy(process) > SECONDS or seconds > BLOCKED):
            os.kill(process, signal.SIGKILL)
        elif asked and not told and seconds > STOPPED:
            os.kill(process, signal.SIGTERM)
            told = True
        time.sleep(0.002)


def _judge(kind: Kind, status: int, usage, text: str) -> str | None:
    """What is wrong with an end, in words."""
    lines = [line for line in text.splitlines() if "error:" in line]
    if "Traceback" in text or status in (70, 71):
        return "a traceback" if status != 71 else "a program was started"
    if status == -signal.SIGKILL:
        return f"longer than {SECONDS} s"
    if usage.ru_maxrss > MEMORY >> 10:
        return f"{usage.ru_maxrss >> 10} MiB"
    if status not in ((0, 2, 128 + signal.SIGTERM) if kind.asked else (0, 2)):
        return f"status {status}"
    if status == 2 and (len(lines) != 1 or text.splitlines()[-1] != lines[0]):
        return "not one line of error"
    if not kind.asked and ("out of memory" in text or "not enough memory" in text):
        return f"more than {MEMORY >> 30} GB asked for"
    return None


def fuzz(seconds: float, rounds: int | None, seed: int, kinds: list[str], corpus: Path, folder: Path) -> int:
    """Cases of all `kinds` in turn, for so long or so many; prints what is wrong, and counts; how many were wrong."""
    counts: dict[str, Counter] = {name: Counter() for name in kinds}
    end, first = time.monotonic() + seconds, seed
    while time.monotonic() < end and seed - first != rounds:
        for name in kinds:
            here = folder / "case"
            how, wrong = attempt(name, Random(f"{name} {seed}"), corpus, here)
            counts[name]["wrong" if wrong else how] += 1
            if wrong:
                print(f"WRONG: --case {name} {seed}: {wrong}\n", flush=True)
            shutil.rmtree(here)
        seed += 1
    for name, count in counts.items():
        print(f"{name:12} {sum(count.values()):6}: {', '.join(f'{number} {how}' for how, number in sorted(count.items()))}")
    return sum(count["wrong"] for count in counts.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rounds", type=int, help="a case of each kind in one; no more than these, if given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--case", nargs=2, metavar=("KIND", "SEED"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        corpus = make_corpus(Path(name) / "corpus")
        if arguments.case is not None:
            kind, seed = arguments.case
            print(*attempt(kind, Random(f"{kind} {seed}"), corpus, Path(name) / "case"))
            print((Path(name) / "case" / ".out").read_text(errors="replace"))
            sys.exit()
        wrong = fuzz(60 * arguments.minutes, arguments.rounds, arguments.seed, arguments.kinds, corpus, Path(name))
        sys.exit(wrong > 0)
