"""Training from a configuration to a finished run directory."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..backend import Choice, choose_backend
from ..checkpoint import constructor_arguments, save_checkpoint, save_model
from ..extras import DISTRIBUTIONS, require
from ..model import CRATE
from .compute import Compute, choose_compute
from .config import ConfigError, TrainConfig
from .digits import CHANNELS, CLASSES, SPLIT_SEED, Digits
from .metrics import Meter, Score, evaluate
from .optimizer import build_optimizer, learning_rate, set_learning_rate
from .plots import plot_curves
from .rundir import RunDirectory

if TYPE_CHECKING:
    from tqdm import tqdm


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and why."""


def train(config: TrainConfig) -> tuple[RunDirectory, Score]:
    """Trains a CRATE on the digits and fills a run directory.

    Equal configurations give bit-identical weights on one machine's CPU with one number of threads.

    Returns:
        The run directory and the score of its model, the one after the last epoch, on the test split.

    Raises:
        ConfigError: the settings do not fit each other, the machine or the disk.
        BackendError: the backend asked for does not run here.
        TrainingError: the loss is no longer finite.
        MissingPackageError: a package of the extra "train" is not installed.
    """
    require(*DISTRIBUTIONS)  # all of them now, and not after the last epoch
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    compute = choose_compute(config.device, config.precision)
    model = build_model(config).to(compute.device)
    backend = choose_backend(config.backend, model.pos_embedding, config.dim_head)
    data = Digits(model.image_size, compute.device)
    if config.batch_size > len(data.train_labels):
        raise ConfigError(f"--batch-size is {config.batch_size}; there are {len(data.train_labels)} training images")
    trainer = Trainer(config, model, data, compute)
    run = RunDirectory.create(config.out, data.name)
    run.write_config(_describe(config, trainer, backend))
    print(f"{compute.describe()}, {compute.precision}, backend {backend.name} ({backend.reason}); run directory {run.path}")
    score = trainer.fit(run)
    save_model(model, run.model)
    plot_curves(run.read_metrics(), run.curves, f"CRATE on the digits: test {score}")
    return run, score


def build_model(config: TrainConfig) -> CRATE:
    """The CRATE that `config` asks for, on the CPU, its weights drawn from the seed."""
    torch.manual_seed(config.seed)
    return CRATE(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=CLASSES,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        pool=config.pool,
        channels=CHANNELS,
        dim_head=config.dim_head,
        dropout=config.dropout,
        emb_dropout=config.dropout,
        ista=config.ista,
        lambd=config.lambd,
        backend=config.backend,
    )


class Trainer:
    """Steps, epochs and their metrics: a model, its data and its optimizer."""

    def __init__(self, config: TrainConfig, model: CRATE, data: Digits, compute: Compute) -> None:
        self.config, self.model, self.data, self.compute = config, model, data, compute
        self.optimizer = build_optimizer(model, config.lr, config.weight_decay)
        # float16 needs its gradients scaled, and the scaler waits for the device at every step; otherwise it does nothing.
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "float16")
        self.steps_per_epoch = len(data.train_labels) // config.batch_size
        self.steps = self.steps_per_epoch * config.epochs
        self.step = 0
        self.lr = 0.0

    def fit(self, run: RunDirectory) -> Score:
        """All epochs, with metrics and checkpoints written to `run`; the test score after the last one."""
        from tqdm import tqdm

        config = self.config
        with tqdm(total=self.steps, unit="step", disable=None, dynamic_ncols=True) as bar:
            for epoch in range(1, config.epochs + 1):
                trained, speed = self._train_epoch(epoch, run, bar)
                tested = self._test(epoch, run)
                bar.set_postfix_str(
                    f"epoch {epoch}, loss {trained.loss:.3f}, test top-1 {tested.top1:.1%}, {speed:,.0f} images/s"
                )
                if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
                    self._save(epoch, run)
                    line = f"epoch {epoch} of {config.epochs}: training {trained}, {speed:,.0f} images/s; test {tested}"
                    bar.write(line)
        return tested

    def _train_epoch(self, epoch: int, run: RunDirectory, bar: tqdm) -> tuple[Score, float]:
        """One pass over the training images; the score since the last line of metrics, and images a second."""
        config = self.config
        self.model.train()
        moves = {"rotate": config.rotate, "zoom": config.zoom, "shift": config.shift}
        meter, start = Meter(self.compute.device), time.perf_counter()
        for images, labels in self.data.train_batches(config.batch_size, config.seed, epoch, **moves):
            self._train_step(images, labels, meter)
            bar.update()
            if self.step % config.log_every == 0 or self.step % self.steps_per_epoch == 0:
                score = self._finite(meter.read(), epoch)
                speed = score.count / (time.perf_counter() - start)
                self._log(run, epoch, "train", score, lr=self.lr, images_per_second=round(speed, 1))
                meter, start = Meter(self.compute.device), time.perf_counter()
        return score, speed

    def _train_step(self, images: torch.Tensor, labels: torch.Tensor, meter: Meter) -> None:
        self.step += 1
        self.lr = learning_rate(self.step, self.steps, self.config.lr, self.config.warmup)
        set_learning_rate(self.optimizer, self.lr)
        with self.compute.autocast():
            logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        meter.add(loss, logits, labels, self.step)

    def _test(self, epoch: int, run: RunDirectory) -> Score:
        score = evaluate(self.model, self.data.test_batches(self.config.batch_size), self.compute, self.step)
        self._log(run, epoch, "test", self._finite(score, epoch))
        return score

    def _log(self, run: RunDirectory, epoch: int, split: str, score: Score, **more) -> None:
        counts = {"loss": score.loss, "top1": score.top1, "correct": score.correct, "count": score.count}
        run.log(step=self.step, epoch=epoch, split=split, **counts, **more)

    def _finite(self, score: Score, epoch: int) -> Score:
        """`score` itself, if all its losses were finite."""
        if score.bad_step is None:
            return score
        lr = learning_rate(score.bad_step, self.steps, self.config.lr, self.config.warmup)
        raise TrainingError(
            f"the loss is not finite at step {score.bad_step} of {self.steps} (epoch {epoch}, learning rate {lr:.3g}); "
            f"a lower --lr or a longer --warmup may help"
        )

    def _save(self, epoch: int, run: RunDirectory) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": self.step,
        }
        save_checkpoint(self.model, run.last_checkpoint, **state)


def _describe(config: TrainConfig, trainer: Trainer, backend: Choice) -> dict:
    """What config.json says: the settings, and all that followed from them and from the machine."""
    data, compute = trainer.data, trainer.compute
    return {
        "config": asdict(config),
        "resolved": {
            "device": str(compute.device),
            "device_name": compute.describe(),
            "precision": compute.precision,
            "backend": backend._asdict(),
            "num_threads": torch.get_num_threads(),
            "steps": trainer.steps,
            "warmup_steps": int(config.warmup * trainer.steps),
        },
        "model": constructor_arguments(trainer.model),
        "data": {
            "name": data.name,
            "split_seed": SPLIT_SEED,
            "train_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "mean": data.mean,
            "std": data.std,
        },
    }
