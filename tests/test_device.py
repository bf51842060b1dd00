"""Changes on the device: each image as torchvision changes it for the same parameters, and no two by the same draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import on_gpu
from helpers.pictures import cut, photographs
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from crate_fast.data.augment import (
    OPERATIONS,
    SIGNED,
    TRIVIALAUGMENT_RANGES,
    central_crop,
    change,
    erase,
    randaugment_ranges,
    random_crop,
    strength,
)
from crate_fast.data.augment_batch import ERASING, Changes, change_each, erased_boxes, fill, mirror
from crate_fast.data.device_loader import Pictures, Resident, resample
from crate_fast.data.order import Plan
from crate_fast.data.philox import CHANGES, CROP, CROP_UNIFORMS, crop_boxes, philox, uniforms
from crate_fast.data.samples import COLOUR
from crate_fast.eval_transform import MEAN, STD
from crate_fast.processes import ALONE, Ranks
from crate_fast.settings import TrainConfig

CPU = torch.device("cpu")
SETTINGS = dict(data="cifar10", rotate=0.0, zoom=0.0, shift=0.0)

TORCHVISION = {name: "".join(word.title() for word in name.split("_")) for name in OPERATIONS} | {
    "autocontrast": "AutoContrast"
}


def batch(height: int, width: int) -> np.ndarray:
    """Photographs, noise, and images of one or two colours, (n, height, width, 3) uint8."""
    draw = np.random.default_rng(0)
    pixels = [np.asarray(cut(photo, 100, draw).resize((width, height))) for photo in photographs().values()]
    pixels += [draw.integers(*bounds, (height, width, 3)) for bounds in ((0, 256), (100, 120), (0, 3))]
    pixels += [np.full((height, width, 3), 77), np.eye(height, width)[..., None] * [9, 200, 255]]
    return np.stack([image.astype(np.uint8) for image in pixels])


def as_torchvision(pixels: np.ndarray, name: str, value: float) -> np.ndarray:
    """One image by torchvision on Pillow's images, which is what the published script runs."""
    word = TORCHVISION[name]
    done = _apply_op(Image.fromarray(pixels), word, value, InterpolationMode.NEAREST, None)
    return np.asarray(done)


SIZES = [("cpu", (40, 40)), ("cpu", (33, 56)), ("cpu", (224, 224)), on_gpu((33, 56))]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("device", "size"), SIZES, indirect=["device"])
def test_an_operation_is_torchvisions_to_the_bit(device, name, size):
    images = batch(*size)
    for ranges in (randaugment_ranges(size[1], size[0]), TRIVIALAUGMENT_RANGES):
        for level in (0, 1, 9, 14, 20, 30):
            value = strength(name, level, ranges)
            values = np.where(np.arange(len(images)) % 2 & (name in SIGNED), -value, value)
            names = np.full(len(images), OPERATIONS.index(name))
            got = change_each(torch.from_numpy(images).to(device), names, values).cpu().numpy()
            for image, one, other in zip(images, values, got, strict=True):
                assert np.array_equal(other, np.asarray(change(Image.fromarray(image), name, float(one)))), (level, one)
                expected = as_torchvision(image, name, float(one))
                assert np.array_equal(other, expected), (level, one, np.abs(other.astype(int) - expected).max())


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30), st.booleans(), st.integers(0, 7)), max_size=12))
def test_each_image_of_a_batch_is_changed_by_itself(chosen):
    images = batch(20, 28)
    pixels = np.stack([images[which] for *_, which in chosen]) if chosen else images[:0]
    names = np.array([number for number, *_ in chosen], np.int64)
    ranges = randaugment_ranges(28, 20)
    values = [strength(OPERATIONS[number], level, ranges) for number, level, *_ in chosen]
    minus = [negative and OPERATIONS[number] in SIGNED for number, _, negative, _ in chosen]
    values = np.array([-value if negative else value for value, negative in zip(values, minus, strict=True)], np.float64)
    before = torch.from_numpy(pixels.copy())
    got = change_each(before, names, values)
    assert np.array_equal(before, pixels)
    for image, number, value, other in zip(pixels, names, values, got.numpy(), strict=True):
        assert np.array_equal(other, np.asarray(change(Image.fromarray(image), OPERATIONS[number], float(value))))


@pytest.mark.parametrize("augment", ["none", "randaugment", "trivial"])
def test_changes_are_drawn_for_each_image_alone(augment):
    config = TrainConfig(augment=augment, erase=0.5, **SETTINGS)
    changes, same = Changes(config, CPU, COLOUR), torch.from_numpy(np.repeat(batch(48, 48)[:1], 64, axis=0))
    indices = np.arange(100, 164)
    got = changes(same.clone(), 3, indices)
    share = len({image.numpy().tobytes() for image in got}) / 64
    assert share > (0.45 if augment == "none" else 0.8)  # of 64 times the same image; flips alone give two
    backwards = changes(same[:9].clone(), 3, indices[8::-1].copy()).flip(0)
    assert torch.equal(backwards, got[:9])
    assert not torch.equal(changes(same.clone(), 4, indices), got)
    assert not torch.equal(Changes(replace(config, seed=1), CPU, COLOUR)(same.clone(), 3, indices), got)
    parameters = uniforms(0, 3, indices, CHANGES, 40)
    assert len(np.unique(parameters)) == parameters.size


def test_strengths_and_choices_are_as_frequent_as_torchvisions():
    for augment in ("randaugment", "trivial"):
        changes = Changes(TrainConfig(augment=augment, **SETTINGS), CPU, COLOUR)
        names, values = changes._choose(uniforms(0, 1, np.arange(20_000), CHANGES, 3), (32, 32))
        counts = np.bincount(names, minlength=len(OPERATIONS)) / 20_000
        assert np.abs(counts - 1 / len(OPERATIONS)).max() < 0.01
        angles = values[names == OPERATIONS.index("rotate")]
        expected = {-14.0, 14.0} if augment == "randaugment" else {4.5 * level for level in range(-30, 31)}
        assert {round(angle, 3) for angle in angles.tolist()} == expected
        assert abs((angles < 0).mean() - 0.5) < 0.05


def test_philox_gives_its_authors_numbers():
    """The known answers of Random123, the authors' library, for philox4x32 with 10 rounds."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    known = {
        ((0,) * 4, (0,) * 2): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        pi: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for (counter, key), expected in known.items():
        assert tuple(int(word[0]) for word in philox(tuple(np.array([c], np.uint64) for c in counter), key)) == expected


def test_crops_are_distributed_as_on_the_host():
    """Means and deviations of area, aspect and place, against those that `random_crop` draws."""
    seen, draw = [], np.random.default_rng(0)

    class Spy:
        size = (341, 256)

        def crop(self, box):
            left, top, right, bottom = box
            seen.append((top, left, bottom - top, right - left))
            return self

        def resize(self, *_):
            return self

    for _ in range(8000):
        random_crop(Spy(), 224, 0.08, draw)
    sides = np.full(8000, 256), np.full(8000, 341)
    boxes = crop_boxes(uniforms(0, 1, np.arange(8000), CROP, CROP_UNIFORMS), *sides, 0.08)
    assert (boxes[:, 0] + boxes[:, 2] <= 256).all() and (boxes[:, 1] + boxes[:, 3] <= 341).all()
    for moment in (np.mean, np.std):
        ours, theirs = moment(boxes, axis=0), moment(np.array(seen), axis=0)
        assert np.abs(ours - theirs).max() < 3  # pixels; the deviation of a mean of 8,000 is about 0.8


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
def test_crops_stay_in_the_image(height, width, least, index):
    boxes = crop_boxes(uniforms(7, 1, np.array([index]), CROP, CROP_UNIFORMS), np.array([height]), np.array([width]), least)
    top, left, h, w = boxes[0].tolist()
    assert min(top, left) >= 0 and min(h, w) > 0 and top + h <= height and left + w <= width


def test_erasing_is_as_frequent_and_as_large_as_on_the_host():
    draw, blank = np.random.default_rng(0), np.zeros((32, 32, 3), np.uint8)
    boxes = erased_boxes(uniforms(0, 1, np.arange(4000), CHANGES, ERASING), 32, 32, 0.25)
    ours = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / 1024
    theirs = np.array([(erase(blank, 0.25, COLOUR, draw) == COLOUR).all(axis=2).mean() for _ in range(4000)])
    assert abs((ours > 0).mean() - 0.25) < 0.025
    assert abs(ours[ours > 0].mean() - theirs[theirs > 0].mean()) < 0.012
    images = torch.from_numpy(batch(32, 32))
    got, colour = fill(images, boxes[:8], torch.from_numpy(COLOUR)), torch.from_numpy(COLOUR)
    for image, other, (top, bottom, left, right) in zip(images, got, boxes[:8].tolist(), strict=True):
        expected = image.clone()
        expected[top:bottom, left:right] = colour
        assert torch.equal(other, expected)


@pytest.mark.parametrize("size", [(1, 1), (6, 9), (3, 64), (40, 125), (224, 224)])
def test_a_mirror_turns_those_that_are_chosen(size):
    images, chosen = torch.from_numpy(batch(*size)), np.arange(8) % 3 == 0
    for image, other, turned in zip(images, mirror(images.clone(), chosen), chosen, strict=True):
        assert torch.equal(other, image.flip(1) if turned else image)


@pytest.mark.parametrize("size", [20, 32, 224])
def test_rectangles_are_squeezed_as_torchvision_does(size):
    """To the bit where they are enlarged; where they shrink, to one value of 256, for Pillow then takes either pass first."""
    pixels = batch(32, 32)
    boxes = crop_boxes(uniforms(0, 1, np.arange(8), CROP, CROP_UNIFORMS), np.full(8, 32), np.full(8, 32), 0.08)
    got = resample(torch.from_numpy(pixels), boxes, (size, size)).numpy()
    for image, other, (top, left, height, width) in zip(pixels, got, boxes.tolist(), strict=True):
        cropped = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(other.astype(int) - expected).max() <= (size < 32)


@pytest.mark.parametrize(("size", "part"), [(224, 0.0), (32, 0.0), (28, 0.875), (64, 0.75)])
@pytest.mark.parametrize("ratio", [1, 2], ids=["square", "wide"])
def test_cifar_is_evaluated_as_from_files(size, part, ratio):
    wide = size * ratio
    labels = list(range(8))
    test = Pictures(batch(32, 32), labels)
    config = TrainConfig(eval_crop=part, image_size=size, **SETTINGS)
    data = Resident("cifar10", test, test, 10, config, CPU, (size, wide))
    shares = [list(data.test_batches(3, Ranks(rank, 2))) for rank in range(2)]
    images, found = (torch.cat(parts) for parts in zip(*(batch for share in shares for batch in share), strict=True))
    assert found.tolist() == labels
    pixels = (images.permute(0, 2, 3, 1).numpy() * STD + MEAN) * 255
    for index, ours in enumerate(pixels):
        assert np.array_equal(ours.round(), np.asarray(central_crop(test.read(index), (size, wide), part)))


def test_cifar_in_training_depends_on_seed_epoch_and_index_alone():
    store = Pictures(np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8), [7] * 50)
    config = TrainConfig(image_size=32, augment="randaugment", erase=0.3, **SETTINGS)

    def epoch_of(epoch: int, first: int = 0, ranks: Ranks = ALONE, **changed) -> list:
        data = Resident("cifar10", store, store, 10, replace(config, **changed), CPU)
        return [images for images, _ in data.train_batches(Plan(50, 16, ranks=ranks), epoch, first)]

    whole = epoch_of(1)
    assert [len(images) for images in whole] == [16, 16, 16, 2]
    assert [len(images) for images in epoch_of(1, first=3, ranks=Ranks(0, 4))] == [0]
    assert all(torch.equal(*pair) for pair in zip(whole[2:], epoch_of(1, first=2), strict=True))
    ranks = zip(epoch_of(1, ranks=Ranks(0, 2)), epoch_of(1, ranks=Ranks(1, 2)), strict=True)
    assert all(torch.equal(torch.cat(halves), images) for halves, images in zip(ranks, whole, strict=True))
    assert not torch.equal(epoch_of(2)[0], whole[0])
    assert not torch.equal(epoch_of(1, seed=3)[0], whole[0])
