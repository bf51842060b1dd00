"""The planning model: exact where it counts, a formula where it models, and the page that it makes."""

from pathlib import Path

import pytest
import torch

import plan
from crate_fast.model import build

ROOT = Path(__file__).parent.parent
PAPER = plan.RECIPES["paper"]


def test_the_page_has_what_the_model_says():
    text = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    made = text.partition(plan.START)[2].partition(plan.END)[0].strip()
    assert made == plan.tables()
    assert made.count("\n| ") == len(plan.SIZES) * len(plan.RECIPES) * (2 + len(plan.GPUS))


def test_parameters_are_the_models():
    for size in plan.SIZES:
        with torch.device("meta"):
            assert plan.parameters(size) == sum(p.numel() for p in build(size).parameters())


def test_a_measured_rate_takes_the_place_of_the_floor():
    needs = plan.plan("base", PAPER, 1, plan.Figures(images_per_second=10_000))
    assert needs.images_per_second == pytest.approx(10_000)
    assert needs.step_ms == pytest.approx(204.8)
    seconds = 150 * (626 * 0.2048 + 50_000 / 10_000 / 3)
    assert needs.hours == pytest.approx(seconds / 3600)
    assert needs.network_gbps == needs.summing == 0


def test_sums_take_the_quicker_of_ring_and_tree():
    """By hand: 80 MB over 16 GPUs at 100 Gbit/s is 12 ms in the ring and 12.8 in the tree; for 80 KB hops are all."""
    figures = plan.Figures(network_gbps=100.0, hop_us=0.0)
    assert plan.sum_seconds(80e6, 16, figures) == pytest.approx(0.012)
    assert plan.sum_seconds(80e6, 16, figures._replace(fsdp=True)) == pytest.approx(0.018)
    assert plan.sum_seconds(80e3, 16, figures._replace(hop_us=1000.0)) == pytest.approx(2 * 80e3 / 12.5e9 + 8e-3)
    assert plan.sum_seconds(80e6, 8, figures) == pytest.approx(2 * 7 / 8 * 80e6 / 450e9)  # within a node


def test_more_gpus_are_never_cheaper_and_small_shares_wait_for_launches():
    for size in plan.SIZES:
        hours = [plan.plan(size, PAPER, gpus).gpu_hours for gpus in plan.GPUS]
        assert hours == sorted(hours)
    assert plan.compute_seconds("tiny", 1, plan.Figures()) == pytest.approx(11 * 12 * 10e-6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--model", "base", "--recipe", "paper", "--gpus", "1", "--images-per-second", "10000"],
            "1 | 204.8 | 0% | 10,000 |",
        ),
        (["--gpus", "0"], "--gpus is 0; it must be from 1 to the 2048 images of a step"),
        (["--hop-us", "-1"], "--hop-us is -1.0; it must be above 0"),
    ],
)
def test_the_command(capsys, words, expected):
    try:
        plan.main(words)
    except SystemExit as end:
        assert end.code == 2
    printed = capsys.readouterr()
    assert expected in printed.out + printed.err
