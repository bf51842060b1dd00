"""The kinds of files that tests/fuzz.py changes: how a healthy one is made, how it is changed, and which commands read it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import shutil
import struct
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes share no threads

import numpy as np
import torch
from PIL import Image

from crate_fast import CRATE
from crate_fast.checkpoint.distributed import STATE, TABLE, checksum
from crate_fast.commands.main import main
from crate_fast.data.pack_file import HEADER, INDEX
from helpers import mutations

SIZES = ["--image-size", "16", "--patch-size", "8", "--dim", "16", "--depth", "1", "--heads", "1", "--dim-head", "16"]
QUICK = [*SIZES, "--device", "cpu", "--batch-size", "4", "--workers", "0", "--num-threads", "1"]
STEP = "run/checkpoints/step-00000002.pt"
PARTS = "parts/checkpoints/step-00000002.dcp"
FORMATS = {"jpg": {}, "png": {}, "gif": {}, "bmp": {}, "tiff": {}, "webp": {}, "ppm": {}, "jpeg": {"progressive": True}}
EVALUATE = ["--data", "folder", "--device", "cpu", "--workers", "0", "--batch-size", "4"]


class FileKind(NamedTuple):
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
    "config": FileKind(
        ("run", "folder"),
        in_file("run/config.json", mutations.change_json),
        [RESUME, ["evaluate", "run"], ["train", "--recipe", "run/config.json", "--out", "new"]],
        asked=True,
    ),
    "metrics": FileKind(("run", "folder"), in_file("run/metrics.jsonl", mutations.change_lines), [RESUME]),
    "checkpoint": FileKind(
        ("run", "folder"),
        in_file(STEP, mutations.change_archive),
        [RESUME, RESUME, ["evaluate", STEP, *EVALUATE], ["convert", STEP, "x.safetensors"], ["train", "--resume", STEP]],
    ),
    "published": FileKind(
        ("folder", "main.pth.tar"),
        in_file("main.pth.tar", mutations.change_archive),
        [
            ["evaluate", "main.pth.tar", *EVALUATE],
            ["convert", "main.pth.tar", "x.safetensors"],
            ["train", "--init", "main.pth.tar", "--data", "folder", "--out", "new", "--epochs", "1", *QUICK],
            ["inspect", "--checkpoint", "main.pth.tar", "--images", "folder/val", "--out", "views"],
        ],
    ),
    "legacy": FileKind(
        ("folder", "legacy.t7"),
        in_file("legacy.t7", mutations.change_archive),
        [["evaluate", "legacy.t7", *EVALUATE], ["convert", "legacy.t7", "x.safetensors"]],
    ),
    "parts": FileKind(
        ("parts", "folder"),
        change_parts,
        [["evaluate", PARTS, *EVALUATE], ["convert", PARTS, "x.pth.tar"], ["train", "--resume", "parts"]],
    ),
    "safetensors": FileKind(
        ("run", "folder"),
        in_file("run/model.safetensors", mutations.change_safetensors),
        [
            ["evaluate", "run"],
            ["convert", "run/model.safetensors", "x.pth.tar"],
            ["train", "--init", "run", "--data", "folder", "--out", "new", "--epochs", "1", *QUICK],
            ["segment", "x.png", "--checkpoint", "run", "--out", "maps"],
            ["predict", "run", "x.png", "--format", "csv"],
        ],
    ),
    "recipe": FileKind(
        ("folder", "recipe.toml"),
        change_recipe,
        [["train", "--recipe", "recipe.toml", "--out", "new"], ["finetune", "--recipe", "recipe.toml", "--out", "new"]],
        asked=True,
    ),
    "pack": FileKind(
        ("run", "packs"),
        change_pack,
        [
            ["train", "--data", "packs", "--out", "new", "--epochs", "1", *QUICK],
            ["evaluate", "run", "--data", "packs", "--workers", "0"],
        ],
    ),
    "image": FileKind(
        ("run", "folder", "images"),
        change_picture,
        [
            ["train", "--data", "folder", "--out", "new", "--epochs", "1", *QUICK],
            ["evaluate", "run", "--data", "folder"],
            ["segment", "x.png", "--checkpoint", "run", "--out", "maps"],
            ["inspect", "run", "--images", "folder/val", "--out", "views"],
            ["predict", "run", "x.png", "folder/val"],
            ["explore", "x.png", "--checkpoint", "run", "--out", "page.html"],
            ["train", "--data", "folder/val", "--out", "new", "--epochs", "1", *QUICK],
            ["prepare", "imagenet", "folder", "new", "--raw", "--workers", "1"],
            ["prepare", "imagenet", "folder", "new", "--workers", "1"],
        ],
    ),
    "hub": FileKind(("hub",), in_file("hub/config.json", mutations.change_json), [["from_pretrained", "hub"]]),
}


@contextlib.contextmanager
def ending():
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


def make_corpus(here: Path) -> Path:
    """`here` with files of every kind, made by a process of its own: this one may not start the threads of a backward pass."""
    here.mkdir()
    process = os.fork()
    if not process:
        with ending(), open(here / "log", "w") as log:
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
