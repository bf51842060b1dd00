"""Data sets in the two formats that the published scripts read, cut out of photographs that packages carry."""

import pickle
from pathlib import Path

import matplotlib
import numpy as np
import sklearn.datasets
from PIL import Image
from scipy.io import savemat

SIDE = 40


def photographs() -> dict[str, Image.Image]:
    """Three photographs by name: a portrait, a temple, a flower."""
    scikit = Path(sklearn.datasets.__file__).parent / "images"
    files = {
        "hopper": Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
        "china": scikit / "china.jpg",
        "flower": scikit / "flower.jpg",
    }
    return {name: Image.open(file).convert("RGB") for name, file in files.items()}


def cut(photograph: Image.Image, side: int, draw: np.random.Generator) -> Image.Image:
    """A random part of a photograph, `side` pixels wide and high."""
    large = int(draw.integers(side, min(photograph.size) // 2))
    left, top = (int(draw.integers(length - large + 1)) for length in photograph.size)
    return photograph.crop((left, top, left + large, top + large)).resize((side, side))


def make_folder(path: Path, train: int, val: int, side: int = SIDE) -> Path:
    """`path` with train/ and val/, in each a folder per photograph; `train` and `val` images in all, as JPEG."""
    draw, sources = np.random.default_rng(0), photographs()
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            name = list(sources)[index % len(sources)]
            (path / split / name).mkdir(parents=True, exist_ok=True)
            cut(sources[name], side, draw).save(path / split / name / f"{index:05d}.jpg", quality=95)
    return path


def make_cifar10(path: Path, train: int, test: int) -> Path:
    """`path` with cifar-10-batches-py in it: `train` and `test` images in the published files, as Python 2 pickled them."""
    draw, sources = np.random.default_rng(0), list(photographs().values())
    folder = path / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, count in [*((f"data_batch_{part}", train // 5) for part in range(1, 6)), ("test_batch", test)]:
        labels = [int(draw.integers(10)) for _ in range(count)]
        pixels = [np.asarray(cut(sources[label % 3], 32, draw)).transpose(2, 0, 1).ravel() for label in labels]
        (folder / name).write_bytes(pickle.dumps({b"data": np.stack(pixels), b"labels": labels}, protocol=2))
    return path


def make_flowers(path: Path) -> Path:
    """`path` with flowers-102 in it, of 12 images: 4 to train on, 2 to validate, 6 to test, their numbers mixed."""
    folder, draw = path / "flowers-102", np.random.default_rng(0)
    (folder / "jpg").mkdir(parents=True)
    for number, name in zip(range(1, 13), [*photographs()] * 4, strict=True):
        cut(photographs()[name], SIDE, draw).save(folder / "jpg" / f"image_{number:05d}.jpg", quality=95)
    splits = {"trnid": [3, 1, 12, 7], "valid": [2, 4], "tstid": [5, 6, 11, 8, 10, 9]}
    labels = [102, 1, 1, 2, 102, 50, 77, 1, 2, 3, 50, 101]
    savemat(folder / "setid.mat", {name: np.array([numbers], np.uint16) for name, numbers in splits.items()})
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    return path


def make_pets(path: Path) -> Path:
    """`path` with oxford-iiit-pet in it, of 9 images: 5 to train on, 4 to test; one is no JPEG, as some there are not."""
    folder, draw = path / "oxford-iiit-pet", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    lists = {"trainval": [("Abyssinian_100", 1), ("beagle_1", 5), ("Birman_2", 7), ("pug_9", 26), ("Bombay_3", 8)]}
    lists["test"] = [("Abyssinian_201", 1), ("yorkshire_terrier_1", 37), ("Sphynx_7", 34), ("beagle_22", 5)]
    for split, images in lists.items():
        lines = [f"{name} {label} {2 - name[0].isupper()} 1\n" for name, label in images]
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))
        for name, _ in images:
            kind = "png" if name == "beagle_1" else "jpeg"
            cut(photographs()["hopper"], SIDE, draw).save(folder / "images" / f"{name}.jpg", format=kind)
    return path


if __name__ == "__main__":
    import sys

    make_folder(Path(sys.argv[1]) / "folder", int(sys.argv[2]), int(sys.argv[2]) // 4)
    make_cifar10(Path(sys.argv[1]) / "cifar", int(sys.argv[2]), int(sys.argv[2]) // 4)
