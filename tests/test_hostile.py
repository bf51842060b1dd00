"""Files from strangers: nothing in them is executed, nothing takes more memory than they have bytes, no link is followed."""

import json
import os
import random
import resource
import shutil
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import torch
from conftest import call
from safetensors import safe_open
from safetensors.torch import save_file

from crate_fast import load_checkpoint
from crate_fast.checkpoint import constructor_arguments
from crate_fast.checkpoint.read import DIGEST, METADATA_KEY, CheckpointError
from crate_fast.training.run_directory import RunDirectory

DEEP = "[" * 200_000
SMALL = ["--dim", "16", "--depth", "1", "--heads", "1", "--dim-head", "16", "--device", "cpu", "--epochs", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch on the digits."""
    from crate_fast.commands.main import main

    out = tmp_path_factory.mktemp("hostile") / "run"
    assert main(["train", "--out", str(out), *SMALL]) == 0
    return RunDirectory(out)


def bomb(path, compression, size=48 << 20):
    """An archive whose pickle is one long string."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02X" + struct.pack("<I", size) + b"a" * size + b".")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_archives_are_not_unpacked(tmp_path, compression):
    path = bomb(tmp_path / "bomb.pth", compression)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"data\.pkl is compressed, which torch\.save never does"):
        load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 << 10  # KiB


@pytest.mark.parametrize("start", [b"X", b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02X"])
def test_no_room_is_made_for_what_is_not_there(tmp_path, start):
    (tmp_path / "short.pth").write_bytes(b"\x80\x02" + start + struct.pack("<I", 2**32 - 1) + b"abc")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"short\.pth: damaged"):
            load_checkpoint(tmp_path / "short.pth")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_parts_that_lie_over_each_other_are_refused(tmp_path):
    path = bomb(tmp_path / "quine.pth", zipfile.ZIP_STORED, size=1 << 20)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        first = archive.infolist()[0]
    content = path.read_bytes()
    entry = content[directory : directory + 46 + len(first.filename)]
    end = content.index(b"PK\x05\x06", directory)
    numbers = struct.pack("<HH", 50, 50) + struct.pack("<II", 50 * len(entry), directory)
    path.write_bytes(content[:directory] + entry * 50 + content[end : end + 8] + numbers + b"\0\0")
    with pytest.raises(CheckpointError, match="longer than its"):
        load_checkpoint(path)


def test_expanded_weights_are_refused(tmp_path, run):
    weights = load_checkpoint(run.model).state_dict()
    weights["mlp_head.1.weight"] = torch.zeros(1).expand(1 << 40, 16)
    torch.save(weights, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"'mlp_head.1.weight' says it has \d+ values, and fewer are stored"):
        load_checkpoint(tmp_path / "wide.pth")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("metrics.jsonl", "train --resume {run}"),
        ("checkpoints/step-00000011.pt", "train --resume {run}"),
        ("checkpoints/best.pt", "evaluate {run}/checkpoints/best.pt --device cpu"),
        ("recipe.json", "train --recipe {run}/recipe.json --out {run}/new"),
        ("x.png", "segment {run}/x.png --checkpoint {run} --out {run}/maps"),
    ],
)
def test_what_may_have_no_end_is_not_read(tmp_path, run, capsys, file, command, make):
    path = shutil.copytree(run.path, tmp_path / "run") / file
    path.unlink(missing_ok=True)
    make(path)
    status, _, err = call(capsys, *command.format(run=tmp_path / "run").split())
    assert (status, err.count("\n")) == (2, 1), err
    assert path.name in err


@pytest.mark.parametrize("command", ["evaluate {run}", "train --resume {run}", "train --recipe {run}/config.json --out {out}"])
def test_deep_json_is_told_in_a_line(tmp_path, run, capsys, command):
    before = run.config.read_bytes()
    run.config.write_text(DEEP)
    try:
        status, _, err = call(capsys, *command.format(run=run.path, out=tmp_path / "new").split())
    finally:
        run.config.write_bytes(before)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "nested too deeply" in err


def test_a_deep_recipe_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / "deep.toml").write_text(f"x = {DEEP}")
    status, _, err = call(capsys, "train", "--recipe", tmp_path / "deep.toml", "--out", tmp_path / "run")
    assert status == 2
    assert len(err.splitlines()) == 1


def test_deep_metadata_are_told_in_a_line(tmp_path, run):
    from safetensors.torch import save_file

    save_file(load_checkpoint(run.model).state_dict(), tmp_path / "deep.safetensors", metadata={"crate_fast": DEEP})
    with pytest.raises(CheckpointError, match="nested too deeply"):
        load_checkpoint(tmp_path / "deep.safetensors")


def test_no_flipped_bit_loads_as_other_weights(tmp_path, run, capsys):
    content, right = run.model.read_bytes(), load_checkpoint(run.model).state_dict()
    generator = random.Random(0)
    for place in [*range(8, 8 + 300, 7), *(generator.randrange(len(content)) for _ in range(200))]:
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        (tmp_path / "model.safetensors").write_bytes(changed)
        try:
            found = load_checkpoint(tmp_path / "model.safetensors").state_dict()
        except CheckpointError:
            continue
        assert all(torch.equal(found[name], value) for name, value in right.items()), place


@pytest.mark.parametrize("what", ["no checkpoint", "a checkpoint"])
def test_metrics_that_are_a_link_are_not_written_through(tmp_path, run, capsys, what):
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "run"))
    victim = tmp_path / "victim"
    victim.write_text("precious\n" * 1000)
    copy.metrics.unlink()
    copy.metrics.symlink_to(victim)
    copy.model.unlink()
    if what == "no checkpoint":
        shutil.rmtree(copy.checkpoints)
        copy.checkpoints.mkdir()
    status, _, err = call(capsys, "train", "--resume", copy.path)
    assert status == 2
    assert "metrics.jsonl" in err
    assert len(err.splitlines()) == 1
    assert victim.read_text() == "precious\n" * 1000


def _other(*keys, value):
    """A change of what lies at `keys` in nested dictionaries: to what `value` makes of it, or away with None."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        if value is None:
            del content[keys[-1]]
        else:
            content[keys[-1]] = value(content[keys[-1]])

    return change


class Hooked:
    """Stored as a tensor that something hangs on."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __reduce__(self):
        make, (*arguments, _) = self._tensor.__reduce_ex__(2)
        return make, (*arguments, OrderedDict(hook=1))


CONTENTS = {
    "no step": _other("step", value=None),
    "a step of another run": _other("step", value=lambda step: step + 1),
    "a meter of words": _other("meter", value=lambda _: ["x"] * 4),
    "settings that are none": _other("settings", value=lambda _: "x"),
    "an optimizer that is none": _other("optimizer", value=lambda _: "x"),
    "an optimizer of fewer weights": _other("optimizer", "state", 0, value=None),
    "moments of another shape": _other("optimizer", "state", 0, "exp_avg", value=lambda moment: moment[..., None]),
    "moments of whole numbers": _other("optimizer", "state", 0, "exp_avg", value=lambda moment: moment.long()),
    "moments of another optimizer": _other("optimizer", "state", 0, value=lambda _: {"momentum_buffer": torch.zeros(1)}),
    "sparse weights": _other("model", "mlp_head.1.weight", value=lambda weight: weight.to_sparse()),
    "weights that are nowhere": _other("model", "mlp_head.1.weight", value=lambda weight: weight.to("meta")),
    "moments that something hangs on": _other("optimizer", "state", 0, "exp_avg", value=Hooked),
    "weights of a larger head": _other("model", "mlp_head.1.weight", value=lambda weight: torch.cat([weight, weight])),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_no_run_goes_on_from_wrong_contents_under_right_checksums(tmp_path, run, capsys, what):
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "run"))
    (newest,) = copy.checkpoints.glob("step-*.pt")
    content = torch.load(newest)
    CONTENTS[what](content)
    torch.save(content, newest)
    before, metrics = newest.read_bytes(), copy.metrics.read_bytes()
    status, _, err = call(capsys, "train", "--resume", copy.path)
    assert (status, err.count("\n")) == (2, 1), err
    assert "crate-fast: error: " in err and "checkpoint" in err
    assert (newest.read_bytes(), copy.metrics.read_bytes()) == (before, metrics)


HUGE = {"1e9": "1000000000", "10**400": "1" + "0" * 400, "5,000 digits": "9" * 5000, "hex": "0x" + "f" * 5000}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("name", ["depth", "dim", "lambd"])
def test_sizes_that_no_machine_has_are_told_in_a_line(tmp_path, run, capsys, name, value):
    """In metadata, in a checkpoint and in a recipe; memory is taken for what is there alone."""
    number, model = int(value, 0) if value[1:2] == "x" or len(value) < 4300 else 10**5000, load_checkpoint(run.model)
    torch.save({"model": model.state_dict(), "arguments": constructor_arguments(model) | {name: number}}, tmp_path / "a.pt")
    with safe_open(run.model, framework="pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != DIGEST}
    changed = json.dumps(json.loads(metadata[METADATA_KEY]) | {name: "@"}).replace('"@"', value)
    save_file(model.state_dict(), tmp_path / "b.safetensors", metadata=metadata | {METADATA_KEY: changed})
    setting = {"num_classes": "classes"}.get(name, name)
    (tmp_path / "c.toml").write_text(f"data = 'digits'\n{setting} = {value}\n")
    files = ["a.pt", "b.safetensors"] if (name, value) != ("lambd", HUGE["1e9"]) else []  # which is only a large number
    commands = [
        *(("inspect", tmp_path / file, "--images", tmp_path) for file in files),
        ("train", "--recipe", tmp_path / "c.toml"),
    ]
    for command in commands:
        status, _, err = call(capsys, *command, "--out", tmp_path / "out")
        assert (status, err.count("\n"), "Traceback" in err) == (2, 1, False), err
        assert len(err) < 1000 and not (tmp_path / "out").exists()
