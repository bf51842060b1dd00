"""CIFAR, Flowers and Pets: read as published, from published files alone, and whole whenever a download is killed."""

import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call
from helpers.pictures import make_archives, make_cifar10, make_flowers, make_pets, trust
from helpers.serving import served
from torchvision.datasets import Flowers102

from crate_fast import load
from crate_fast.data import download, published_sets
from crate_fast.data.device_loader import Pictures
from crate_fast.data.open import open_data
from crate_fast.data.published_sets import SETS, open_published
from crate_fast.files import remove
from crate_fast.optional import MissingPackageError
from crate_fast.processes import ALONE
from crate_fast.training import ConfigError, resolve

COUNTS = {"cifar10": (50, 20, 10), "flowers102": (4, 6, 102), "pets": (5, 4, 37)}
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
BATCHES_FOLDER = "cifar-10-batches-py"


def make_all(path: Path) -> Path:
    return make_pets(make_flowers(make_cifar10(path, train=50, test=20)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """All sets, their archives beside them."""
    return make_archives(make_all(tmp_path_factory.mktemp("source")))


@pytest.fixture
def server(source, monkeypatch):
    """A server of `source`, whose files are the published ones."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with served(source) as server:
        trust(monkeypatch, source, server.url)
        yield server


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """All sets, unpacked, to be changed; what is in them now is what is published."""
    trust(monkeypatch, make_all(tmp_path / "copy"))
    return tmp_path / "copy"


def contents(name: str, directory: Path) -> list:
    """Labels of both parts, and pixels or files in them."""
    parts = open_published(name, directory)[:2]
    labels = [[part.label(index) for index in range(len(part))] for part in parts]
    kept = [
        p.pixels.tobytes() if name == "cifar10" else [np.asarray(p.read(i)).tobytes() for i in range(len(p))] for p in parts
    ]
    return [labels, kept]


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.name.startswith(".")]


def refusal(name: str, directory: Path) -> str:
    """The one line in which opening ends."""
    with pytest.raises(ConfigError) as caught:
        open_published(name, directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cifar_is_read_as_published(copy, recwarn):
    train_images, test, classes, _ = open_published("cifar10", copy)
    assert (len(train_images), len(test), classes) == COUNTS["cifar10"]
    assert not [warning for warning in recwarn if warning.category is not DeprecationWarning]
    with open(copy / BATCHES_FOLDER / "data_batch_2", "rb") as file:
        raw = pickle.load(file, encoding="latin1")
    assert [train_images.label(10 + index) for index in range(10)] == raw["labels"]
    pixels = np.asarray(train_images.read(13)).transpose(2, 0, 1).ravel()
    assert np.array_equal(pixels, raw["data"][3])
    assert contents("cifar10", copy / BATCHES_FOLDER) == contents("cifar10", copy)  # the folder itself


def test_flowers_and_pets_are_split_and_labelled_as_published(copy):
    train, test, classes, _ = open_published("flowers102", copy)
    assert classes == 102
    assert [train.label(i) for i in range(4)] == [0, 101, 100, 76]
    numbers = [int(re.search(r"image_(\d+)", test.place(index))[1]) for index in range(6)]
    assert numbers == [5, 6, 11, 8, 10, 9]
    train, test, classes, _ = open_published("pets", copy)
    assert (classes, len(train), len(test)) == (37, 5, 4)
    assert [train.label(i) for i in range(5)] == [0, 4, 6, 25, 7]
    assert train.read(1).mode == "RGB"  # a PNG by the name of a JPEG
    assert [test.label(i) for i in range(4)] == [0, 36, 33, 4]


@pytest.mark.parametrize(("name", "count"), [("flower", 6), ("pets", 4)])
def test_the_published_finetuning_of_flowers_and_pets(tmp_path, copy, capsys, name, count):
    words = ["finetune", "--data", name, "--data_dir", copy, "--n_epochs", "1", "--bs", "4", "--workers", "0", "--out"]
    status, out, err = call(capsys, *words, tmp_path / "run", "--image-size", "32", "--device", "cpu")
    assert status == 0, err
    assert f"of {count})" in out
    named = name == "flower" and hasattr(Flowers102, "classes")
    assert load(tmp_path / "run").names[0] == ("pink primrose" if named else "class 0")  # four breeds are not 37


def test_classes_have_the_names_that_torchvision_has_for_them(tmp_path, monkeypatch):
    make_pets(make_flowers(make_cifar10(tmp_path, train=5, test=1)))
    kinds = [f"kind {number}" for number in range(10)]
    (tmp_path / BATCHES_FOLDER / "batches.meta").write_bytes(pickle.dumps({"label_names": kinds}))
    trust(monkeypatch, tmp_path)
    assert open_published("cifar10", tmp_path).names == kinds
    assert open_published("flowers102", tmp_path).names == getattr(Flowers102, "classes", None)
    assert open_published("pets", tmp_path).names is None  # not all have images here
    pets = tmp_path / "oxford-iiit-pet"
    for number in range(1, 38):
        os.link(pets / "images" / "pug_9.jpg", pets / "images" / f"small_dog-{number}_1.jpg")
    lines = [f"small_dog-{number}_1 {number} 2 1\n" for number in range(37, 0, -1)]
    (pets / "annotations" / "trainval.txt").write_text("".join(lines))
    assert open_published("pets", tmp_path).names == [f"Small Dog-{number}" for number in range(1, 38)]


class Calls:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("whole_folder", [False, True])
@pytest.mark.parametrize("file", BATCHES)
def test_nothing_is_unpickled_whose_checksum_is_another(copy, tmp_path, file, whole_folder):
    folder = copy / BATCHES_FOLDER
    (folder / file).write_bytes(pickle.dumps(Calls(tmp_path / "executed")))
    words = refusal("cifar10", folder if whole_folder else copy)
    again = "" if whole_folder else f"; remove {folder} to have it made anew"
    assert words == f"{folder / file}: not the published file of cifar10 (its MD5 is another){again}"
    assert not (tmp_path / "executed").exists()


def test_names_of_classes_are_neither_needed_nor_unpickled(copy, tmp_path):
    (copy / BATCHES_FOLDER / "batches.meta").write_bytes(pickle.dumps(Calls(tmp_path / "executed")))
    assert len(open_published("cifar10", copy)[0]) == 50
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102"])
def test_files_that_only_look_like_the_published_ones_are_refused(tmp_path, name):
    """By the checksums that torchvision has."""
    make_flowers(make_cifar10(tmp_path, train=5, test=1))
    (tmp_path / "cifar-100-python").mkdir()
    for file in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / file).write_bytes((tmp_path / BATCHES_FOLDER / "test_batch").read_bytes())
    assert f"not the published file of {name} (its MD5 is another)" in refusal(name, tmp_path)


DAMAGED = {
    f"{BATCHES_FOLDER}/data_batch_4": (lambda content: content[:-1], r"data_batch_4: not the published file of cifar10"),
    f"{BATCHES_FOLDER}/test_batch": (None, r"test_batch of cifar10 is missing"),
    "flowers-102/setid.mat": (lambda content: b"MATLAB", r"setid\.mat: not the published file of flowers102"),
    "flowers-102/jpg/image_00011.jpg": (None, r"image_00011\.jpg of flowers102 is missing"),
    "oxford-iiit-pet/annotations/trainval.txt": (lambda content: b"Abyssinian_100 one 1 1\n", r"files of pets are damaged"),
    "oxford-iiit-pet/annotations/test.txt": (lambda c: b"Abyssinian_201 38 1 1\n", r"has the label 38; pets has 1 to 37"),
    "oxford-iiit-pet/annotations": ("empty", r"annotations/trainval\.txt: No such file"),
}


@pytest.mark.parametrize("place", DAMAGED)
def test_damaged_files_are_named(copy, place):
    change, words = DAMAGED[place]
    if change is None:
        (copy / place).unlink()
    elif change == "empty":
        for file in (copy / place).iterdir():
            file.unlink()
    else:
        (copy / place).write_bytes(change((copy / place).read_bytes()))
    name = "cifar10" if "cifar" in place else "flowers102" if "flower" in place else "pets"
    assert re.search(words, refusal(name, copy))


def test_a_label_too_many_is_named_as_the_files_count_it(monkeypatch, tmp_path):
    for name, words in (("cifar10", "the label 10; cifar10 has 0 to 9"), ("pets", "the label 38; pets has 1 to 37")):
        wrong = Pictures(np.zeros((1, 2, 2, 3), np.uint8), [SETS[name].classes])
        monkeypatch.setattr(published_sets, "_bring_and_open", lambda *_, wrong=wrong: (wrong, wrong, None))
        assert words in refusal(name, tmp_path)


@pytest.mark.parametrize("name", COUNTS)
def test_a_set_is_downloaded_once_and_then_read_where_it_lies(server, source, tmp_path, capsys, name):
    first = contents(name, tmp_path / "data")
    assert first == contents(name, source)
    assert set(server.asked.values()) == {1}
    assert capsys.readouterr().out.count("downloading") == len(server.asked)
    server.asked.clear()
    assert contents(name, tmp_path / "data") == first
    assert not server.asked
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    "place", ["cifar-10-batches-py/data_batch_2", "flowers-102/setid.mat", "flowers-102/jpg/image_00011.jpg"]
)
def test_what_a_refusal_says_to_remove_is_made_anew(server, source, tmp_path, place):
    name = "flowers102" if "flower" in place else "cifar10"
    open_published(name, tmp_path)
    (tmp_path / place).unlink() if "jpg" in place else (tmp_path / place).write_bytes(b"other")
    remove(Path(re.search(r"; remove (.+) to have it made anew$", refusal(name, tmp_path))[1]))
    assert contents(name, tmp_path) == contents(name, source)


def test_archives_that_lie_there_are_not_downloaded(server, source, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes((source / "cifar-10-python.tar.gz").read_bytes())
    assert contents("cifar10", tmp_path) == contents("cifar10", source)
    assert not server.asked


def test_another_archive_than_the_published_is_refused_and_kept(server, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"mine")
    assert "not the published file (its MD5 is another); remove it to download it again" in refusal("cifar10", tmp_path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"mine"]
    assert not server.asked


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", r"its MD5 is another\)"),
        ("stalled", r"cannot be downloaded \(.*timed out\)"),
        ("absent", r"has no cifar-10-batches-py, and http.*/absent cannot be downloaded \(.*(?i:not found).*\)"),
        ("nobody", r"cannot be downloaded \(.*refused\)"),
        ("others", r"its MD5 is another\)"),
    ],
)
def test_a_download_that_fails_leaves_but_a_line(server, source, tmp_path, monkeypatch, capsys, fault, words):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    changed = {"absent": f"{server.url}/absent", "nobody": "http://127.0.0.1:9/file", "others": f"{server.url}/images.tar.gz"}
    monkeypatch.setattr(CIFAR10, "url", changed.get(fault, CIFAR10.url))
    server.fault = fault if fault in ("cut", "stalled") else None
    assert re.search(words, refusal("cifar10", tmp_path))
    assert not any(tmp_path.iterdir())
    assert not capsys.readouterr().err
    trust(monkeypatch, source, server.url)
    server.fault = None
    assert contents("cifar10", tmp_path) == contents("cifar10", source)


def open_until_killed(name: str, directory: Path, moment: int) -> bool:
    """Opens a set in a process that kills itself before it touches the directory for the `moment`th time; whether it has."""
    pid = os.fork()
    if pid == 0:
        touched = []

        def look(event, arguments):
            if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove") and str(directory) in str(arguments[0]):
                touched.append(event)
                if len(touched) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(look)
            open_published(name, directory)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "flowers102"])
def test_a_set_is_whole_whenever_its_making_was_killed(server, source, tmp_path, name):
    expected, moment = contents(name, source), 1
    while open_until_killed(name, tmp_path / str(moment), moment):
        assert contents(name, tmp_path / str(moment)) == expected, moment
        assert not leftovers(tmp_path), moment
        moment += 1
    assert moment > 20


def test_processes_that_want_the_same_set_download_it_once(server, source, tmp_path):
    pids = []
    for _ in range(3):
        pids.append(os.fork())
        if pids[-1] == 0:
            whole = False
            try:
                whole = len(open_published("flowers102", tmp_path)[1]) == 6
            finally:
                os._exit(0 if whole else 1)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert set(server.asked.values()) == {1}
    assert not leftovers(tmp_path)


def test_torchvision_is_asked_for_where_a_published_set_is(tmp_path, monkeypatch):
    config = resolve(dict(data="cifar10", data_dir=str(tmp_path), device="cpu", workers=0))
    monkeypatch.setattr("crate_fast.optional.find_spec", lambda name: None if name == "torchvision" else name)
    with pytest.raises(MissingPackageError, match=r"^this needs torchvision: pip install 'crate-fast\[train\]'$"):
        open_data(config, torch.device("cpu"), ALONE)
    assert set(SETS) == {"cifar10", "cifar100", "flowers102", "pets"}


@pytest.mark.slow
def test_nothing_else_needs_torchvision():
    line = "import sys; sys.modules['torchvision'] = None; import crate_fast.commands.main, crate_fast.training.run"
    subprocess.run([sys.executable, "-c", line], check=True)
