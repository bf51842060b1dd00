"""The loop's parts: gradients of parts and processes, schedules, masks, mixing, and what waits for the device."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crate_fast.data.digits import Digits
from crate_fast.data.order import Plan, make_plan, share_of
from crate_fast.device import choose_compute
from crate_fast.optimizers import OPTIMIZERS
from crate_fast.processes import ALONE, Ranks
from crate_fast.signals import Signals
from crate_fast.training import TrainConfig, TrainingError, train
from crate_fast.training.loop import Trainer
from crate_fast.training.mixing import mix
from crate_fast.training.optimizer import finetune_factor, learning_rate_at, main_factor
from crate_fast.training.parallel.ddp import Flat
from crate_fast.training.run import build_model

SMALL = TrainConfig(
    **dict(image_size=8, dim=16, depth=1, heads=1, dim_head=16, device="cpu", num_threads=1, lr=1e-3),
    **dict(rotate=0.0, zoom=0.0, shift=0.0, batch_size=64, epochs=2),
)


def make_trainer(**changes) -> Trainer:
    config = replace(SMALL, **changes)
    compute = choose_compute(config.device, config.precision)
    data = Digits((8, 8), compute.device)
    plan = make_plan(config, data.train_count, ALONE)
    return Trainer(config, build_model(config, data).to(compute.device), data, plan, compute, Signals(tell=True))


def step(trainer: Trainer, place: int = 0) -> None:
    trainer._train_step(place, trainer.data.train_batches(trainer.plan, 1, place))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("accumulate", [4, 64])
def test_accumulation_gives_the_gradient_of_the_whole_batch(accumulate):
    whole, parts = make_trainer(last_batch="keep"), make_trainer(accumulate=accumulate, last_batch="keep")
    for place in (0, 22):  # the last one has 29 images of 64, so that with 64 parts some are empty
        for trainer in (whole, parts):
            step(trainer, place)
        assert distance(parts.flat.gradients, whole.flat.gradients) < 1e-6
        parts.flat.weights.copy_(whole.flat.weights)
    assert parts.meter.read()[1:] == whole.meter.read()[1:]


GRADIENTS = """
import sys, torch
from test_loop import make_trainer, step
from crate_fast.data.order import make_plan
from crate_fast.processes import process_group, read_ranks
from crate_fast.training.parallel.ddp import replicate

ranks = read_ranks()
with process_group(ranks, torch.device("cpu")):
    trainer = make_trainer(last_batch="keep", accumulate=2)
    trainer.plan = make_plan(trainer.config, trainer.data.train_count, ranks)
    trainer.ranks, trainer.net = ranks, replicate(trainer.model, trainer.compute)
    step(trainer, 0)
    step(trainer, 22)
    torch.save([trainer.flat.gradients, trainer.flat.weights, trainer.meter.sums], sys.argv[1] + str(ranks.rank))
"""


def torchrun(ranks: int, *words, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False, **options)


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    done = torchrun(2, tmp_path / "gradients.py", tmp_path / "rank")
    assert done.returncode == 0, done.stderr
    whole = make_trainer(last_batch="keep")
    step(whole, 0)
    step(whole, 22)
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert distance(first[0], whole.flat.gradients) < 1e-6
    assert distance(first[1], whole.flat.weights) < 1e-6
    assert torch.equal(first[2][1:], whole.meter.sums[1:])


@pytest.mark.parametrize(
    ("count", "batch", "accumulate", "ranks"), [(1003, 60, 2, 3), (50, 60, 1, 2), (61, 60, 5, 4), (7, 2, 1, 1)]
)
def test_plans_take_every_image_once(count, batch, accumulate, ranks):
    plans = [Plan(count, batch, accumulate=accumulate, ranks=Ranks(rank, ranks)) for rank in range(ranks)]
    taken = []
    for place in range(plans[0].steps):
        parts = [part for plan in plans for part in plan.parts(place)]
        assert len(parts) == ranks * accumulate
        sizes = [part.stop - part.start for part in parts]
        assert sum(sizes) == plans[0].images(place)
        assert max(sizes) - min(sizes) <= 1
        taken += [index for part in parts for index in range(part.start, part.stop)]
    assert taken == list(range(count))
    assert [index for rank in range(ranks) for index in share_of(count, Ranks(rank, ranks))] == list(range(count))


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("epochs", [1, 3, 30, 200])
def test_published_schedules_are_those_of_the_scripts(epochs):
    """Against PyTorch's own schedulers, stepped as the scripts step them."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: min((epoch + 1) / (20 + 1e-8), 0.5 * (math.cos(epoch / epochs * math.pi) + 1))
    )
    other = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(other, epochs)
    for epoch in range(epochs):
        assert main_factor(epoch, epochs) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        assert finetune_factor(epoch, epochs) == pytest.approx(other.param_groups[0]["lr"], abs=1e-12)
        for one in (optimizer, other):
            one.step()
        scheduler.step()
        cosine.step(epoch - 1)
    config = replace(SMALL, schedule="main-epoch", epochs=30, lr=0.5)
    assert learning_rate_at(21, 10, config) == 0.5 * main_factor(2, 30)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_is_held_to_what_the_optimizer_keeps(name):
    trainer = make_trainer(optimizer=name)
    step(trainer)
    assert type(trainer.optimizer).__name__ == name  # by which a checkpoint's state of it is judged
    assert [set(kept) for kept in trainer.optimizer.state.values()] == [OPTIMIZERS[name].keeps] * len(trainer.optimizer.state)
    assert trainer.optimizer.state


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_is_taken_up_by_the_run_that_wrote_it(name, decay):
    trainer, other = (make_trainer(optimizer=name, decay=decay, seed=seed) for seed in (0, 1))
    step(trainer)
    other.load(copy.deepcopy({"model": trainer.model.state_dict(), "path": "here", **trainer.state()}))
    for each in (trainer, other):
        each._train_step(1, trainer.data.train_batches(trainer.plan, 1, 1))
    assert torch.equal(trainer.flat.weights, other.flat.weights)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_moves_nothing(name):
    trainer = make_trainer(optimizer=name, weight_decay=0.1, ema=0.5)
    step(trainer)
    before, average = trainer.flat.weights.clone(), trainer.flat_average.weights.clone()
    images, labels = next(trainer.data.train_batches(trainer.plan, 1))
    images[0, 0, 0, 0] = math.nan
    trainer._train_step(1, iter([(images, labels)]))
    assert torch.equal(trainer.flat.weights, before)
    step(trainer, 2)  # nor does any step after it
    assert torch.equal(trainer.flat.weights, before)
    assert trainer.bad_step.item() == 2
    assert trainer.flat_average.weights.isfinite().all()
    assert not torch.equal(average, before)


def test_a_run_that_is_not_finite_stops_at_the_next_line_of_metrics(tmp_path, monkeypatch):
    batches = Digits.train_batches

    def poisoned(self, plan, epoch, first=0):
        for place, (images, labels) in enumerate(batches(self, plan, epoch, first)):
            yield (images * math.nan if (epoch, place) == (2, 3) else images), labels

    monkeypatch.setattr(Digits, "train_batches", poisoned)
    words = r"not finite at step 26 of 44 \(epoch 2, learning rate 0\.\d+\).*last good checkpoint is .*step-00000022\.pt"
    with pytest.raises(TrainingError, match=words):
        train(replace(SMALL, out=str(tmp_path / "run"), log_every=5, checkpoint_every=1))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 25


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers read off tensors, and indices found in them."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "item")
        return function(*arguments, **(options or {}))


def test_steps_that_log_nothing_wait_for_nothing():
    trainer = make_trainer(ema=0.9, mixup=0.2, cutmix=1.0, clip_norm=1.0, accumulate=2, dropout=0.1)
    batches = trainer.data.train_batches(trainer.plan, 1)
    with Waits() as waits:
        for place in range(3):
            trainer._train_step(place, batches)
        assert waits.count == 0
        trainer._check_finite()
        assert waits.count == 1


def test_mixing_weighs_both_labels_and_depends_on_its_key_alone():
    images, labels, logits = torch.rand(6, 3, 16, 16), torch.arange(6), torch.randn(6, 6)
    seen = set()
    for number in range(40):
        config = replace(SMALL, mixup=1.0, cutmix=1.0)
        batch, again = (mix(images, labels, config, (0, number)) for _ in range(2))
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.others, labels.flip(0))
        blend = batch.part * images + (1 - batch.part) * images.flip(0)
        if torch.allclose(batch.images, blend, atol=1e-6):
            seen.add("mixup")
        else:
            seen.add("cutmix")
            own = (batch.images == images).all(dim=1).float().mean()
            assert own.item() == pytest.approx(batch.part, abs=1e-3)
        soft = torch.zeros(6, 6).scatter_add_(1, labels[:, None], torch.full((6, 1), batch.part))
        soft.scatter_add_(1, batch.others[:, None], torch.full((6, 1), 1 - batch.part))
        expected = torch.nn.functional.cross_entropy(logits, soft, label_smoothing=0.1, reduction="sum")
        torch.testing.assert_close(batch.loss(logits, 0.1), expected)
    assert seen == {"mixup", "cutmix"}
    assert mix(images, labels, SMALL, (0,)).images is images


def test_clipping_and_the_mean_of_the_weights():
    model = torch.nn.Linear(3, 5)
    flat = Flat(model)
    flat.gradients.zero_()
    model.weight.grad.fill_(2.0)
    norm = flat.gradients.norm()
    flat.clip(norm, 1.0)
    assert model.weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    flat.clip(flat.gradients.norm(), 10.0)
    assert model.weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    trainer = make_trainer(ema=0.5)
    mean = trainer.flat.weights.clone()
    for place in range(3):
        step(trainer, place)
        mean = mean.lerp(trainer.flat.weights, 1 - min(0.5, (2 + place) / (11 + place)))
    torch.testing.assert_close(trainer.flat_average.weights, mean)


def test_decay_can_leave_out_vectors_and_embeddings():
    trainer = make_trainer(decay="matrices")
    decaying, other = trainer.optimizer.param_groups
    assert all(p.dim() == 2 for p in decaying["params"])
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    named = dict(trainer.model.named_parameters())
    assert any(p is named["pos_embedding"] for p in other["params"])
    assert len(decaying["params"]) + len(other["params"]) == len(named)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_16_bit_training_learns(tmp_path, precision):
    config = replace(SMALL, out=str(tmp_path / "run"), precision=precision, epochs=6, dim=32, lr=2e-3)
    run, score = train(config)
    assert score.top1 > 0.5
    assert run.path == tmp_path / "run"


def test_the_stream_of_the_fused_kernels_is_a_setting():
    assert [make_trainer(**given).model.transformer.stream for given in ({}, {"stream": "float32"})] == ["auto", "float32"]
