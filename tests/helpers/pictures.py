"""Data sets in the two formats that the published scripts read, cut out of photographs that packages carry."""

import hashlib
import pickle
import tarfile
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
        (folder / name).write_bytes(as_python_2(pickle.dumps({"data": np.stack(pixels), "labels": labels}, protocol=2)))
    return path


def as_python_2(pickled: bytes) -> bytes:
    """A pickle of an array with NumPy's names of that time, and whole numbers for what are booleans now."""
    return pickled.replace(b"numpy._core", b"numpy.core").replace(b"\x89\x88\x87", b"K\x00K\x01\x87", 1)


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


def make_archives(path: Path) -> Path:
    """`path` with the published files of the data sets that are made there, beside them."""
    archives = {
        "cifar-10-python.tar.gz": "cifar-10-batches-py",
        "102flowers.tgz": "flowers-102/jpg",
        "images.tar.gz": "oxford-iiit-pet/images",
        "annotations.tar.gz": "oxford-iiit-pet/annotations",
    }
    for name, folder in archives.items():
        if not (path / folder).is_dir():
            continue
        with tarfile.open(path / name, "w:gz", compresslevel=1) as archive:
            archive.add(path / folder, Path(folder).name)
    for file in path.glob("flowers-102/*.mat"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def trust(patch, path: Path, url: str = "http://127.0.0.1:9") -> None:
    """Has torchvision take the made data sets and archives in `path` for the published ones, to be had at `url`.

    patch: a pytest.MonkeyPatch, which undoes it.
    """
    from torchvision.datasets import CIFAR10, Flowers102, OxfordIIITPet

    for table in ("train_list", "test_list"):
        files = [file for file, _ in getattr(CIFAR10, table)]
        patch.setattr(CIFAR10, table, [[file, _md5(path / CIFAR10.base_folder / file)] for file in files])
    patch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": _md5(path / CIFAR10.base_folder / "batches.meta") or "0"})
    patch.setattr(CIFAR10, "url", f"{url}/{CIFAR10.filename}")
    patch.setattr(CIFAR10, "tgz_md5", _md5(path / CIFAR10.filename))
    patch.setattr(Flowers102, "_download_url_prefix", f"{url}/")
    named = {key: file for key, (file, _) in Flowers102._file_dict.items()}
    places = {key: path / file if key == "image" else path / "flowers-102" / file for key, file in named.items()}
    patch.setattr(Flowers102, "_file_dict", {key: (file, _md5(places[key])) for key, file in named.items()})
    archives = [address.rsplit("/", 1)[-1] for address, _ in OxfordIIITPet._RESOURCES]
    patch.setattr(OxfordIIITPet, "_RESOURCES", tuple((f"{url}/{file}", _md5(path / file)) for file in archives))


def _md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest() if file.is_file() else ""


if __name__ == "__main__":
    import sys

    make_folder(Path(sys.argv[1]) / "folder", int(sys.argv[2]), int(sys.argv[2]) // 4)
    make_cifar10(Path(sys.argv[1]) / "cifar", int(sys.argv[2]), int(sys.argv[2]) // 4)
