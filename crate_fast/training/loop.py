"""Steps and epochs: a model, its data and its optimizer, from any step to the end."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..backend import choose_backend
from ..called import called
from ..data.open import Data
from ..data.order import Plan, most_batches
from ..device import Compute
from ..errors import TrainingError
from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from ..settings import TrainConfig
from ..signals import Signals, Stopped
from .checkpoint_contents import check_place
from .circumstances import circumstances
from .data_wait import DataWait
from .metrics import Meter, Score, evaluate
from .monitor import Monitor, peak_flops, training_flops
from .objectives import OBJECTIVES, Place
from .optimizer import build_optimizer, learning_rate_at, set_learning_rate
from .parallel import parallel_kind
from .progress import Progress, Sums
from .run_directory import RunDirectory

NEVER = torch.iinfo(torch.int64).max


class Trainer:
    """Trains `model` on `data` as `config` and `plan` say. Its state is the same in every process at the end of every step."""

    def __init__(
        self, config: TrainConfig, model: CRATE | CRATEMAE, data: Data, plan: Plan, compute: Compute, signals: Signals
    ) -> None:
        self.config, self.model, self.data, self.plan, self.compute = config, model, data, plan, compute
        self.ranks, self.signals = plan.ranks, signals
        self.objective = OBJECTIVES[config.objective](config)
        self.backend = choose_backend(config.backend, model.cls_token, config.dim_head)
        self.flops, self.peak = training_flops(model), peak_flops(config, compute)
        self.average = copy.deepcopy(model).requires_grad_(False) if config.ema else None
        self.parallel = parallel_kind(config)(model, self.average, config, plan, compute)
        self.flat, self.flat_average, self.net = self.parallel.flat, self.parallel.flat_average, self.parallel.net
        self.optimizer = build_optimizer(model, config)
        # float16 needs its gradients scaled, and the scaler waits for the device at every step; otherwise it does nothing.
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "float16")
        self.steps = plan.steps * config.epochs
        self.step = self.evaluated = 0  # steps made; epochs made and evaluated
        self.score: Score | None = None
        self.best = -1.0
        self.meter = Meter(compute.device, self.objective.score)
        self.data_wait = DataWait(compute.device, data.advice)
        self.bad_step = torch.full((), NEVER, device=compute.device)
        self._saved = time.monotonic()

    def fit(self, run: RunDirectory) -> Score:
        """All steps and epochs that are left, with metrics and checkpoints written to `run`; the last test score.

        Raises:
            TrainingError: a loss or gradient was not finite.
            Stopped: a signal came; where this process is the first, a checkpoint is written.
            SavingError, UnreadableError: a checkpoint cannot be written; too many images cannot be read.
        """
        self.run, self.checkpoints = run, self.parallel.checkpoints(run.checkpoints, self.config.keep_checkpoints)
        self.signals.training = True
        tells = self.config.objective == "classes"
        self.progress = Progress(self.config, self.steps, self.plan.steps, self.step, self.ranks.first, accuracies=tells)
        with self.progress, Monitor(self.config, run, self.ranks.first, self.step) as self.monitor:
            while self.evaluated < self.config.epochs:
                self._train_epoch()
                self._evaluate_epoch()
        return cast("Score", self.score)  # of the last epoch, of which there is one

    @property
    def evaluated_model(self) -> CRATE | CRATEMAE:
        """The model that is evaluated, and saved in the end: the mean of the weights where there is one."""
        return self.model if self.average is None else self.average

    def state(self) -> dict:
        """What a checkpoint needs beside the model to go on to the same bits."""
        return {
            **self.parallel.tensors(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch": self.evaluated,
            "meter": self.meter.sums.tolist(),
            "score": None if self.score is None else list(self.score),
            "best": self.best,
            "settings": asdict(self.config) | {"precision": self.compute.precision},
            "circumstances": self.circumstances(),
        }

    def circumstances(self) -> dict:
        """What the bits depend on beside the settings."""
        return circumstances(self.config, self.compute, self.ranks, fused=self.backend.name == "triton")

    def load(self, checkpoint: dict) -> None:
        """Takes up where `checkpoint` was saved.

        Raises:
            CheckpointError: it is of another run, whatever its checksums say.
        """
        check_place(
            checkpoint,
            Path(checkpoint["path"]),
            epochs=self.config.epochs,
            steps=self.plan.steps,
            scaling=self.scaler.state_dict(),
        )
        self.parallel.load(checkpoint, self.optimizer)
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.evaluated, self.best = checkpoint["step"], checkpoint["epoch"], checkpoint["best"]
        self.meter.sums.copy_(torch.tensor(checkpoint["meter"], dtype=torch.float64))
        self.score = None if checkpoint["score"] is None else self.objective.score(*checkpoint["score"])

    def _train_epoch(self) -> None:
        """The steps of the epoch that are left."""
        first = self.step - self.evaluated * self.plan.steps
        self.model.train()
        batches = self.data.train_batches(self.plan, self.evaluated + 1, first)
        start, logged = time.perf_counter(), self.step
        for place in range(first, self.plan.steps):
            self._train_step(place, batches)
            self.progress.step(self.step, partial(self._untold, start, self.step - logged))
            self.monitor.step()
            if self.step % self.config.log_every == 0 or place + 1 == self.plan.steps:
                self._log_training(start, self.step - logged)
                start, logged = time.perf_counter(), self.step
            self._pause()

    def _train_step(self, place: int, batches) -> None:
        """One step, the epoch's `place`-th. Nothing here waits for the device."""
        self.step += 1
        self.lr = learning_rate_at(self.step, self.plan.steps, self.config)
        set_learning_rate(self.optimizer, self.lr)
        self.flat.zero()
        sums = torch.zeros_like(self.meter.sums)
        for part in range(self.plan.accumulate):
            with self.data_wait:
                images, labels = next(batches)
            sums += self._accumulate(images, labels, part, place)
        self._update(self.ranks.sum(sums))

    def _accumulate(self, images: Tensor, labels: Tensor, part: int, place: int) -> Tensor:
        """Adds a part's share of the gradient of the mean over the images of the step, the epoch's `place`-th; its sums for
        the meter."""
        key = (self.config.seed, self.step, self.ranks.rank, part)
        torch.manual_seed(hash_of(key))  # for dropout
        where = Place(key, self.evaluated + 1, self.plan.parts(place)[part])
        with self.parallel.summing(last=part + 1 == self.plan.accumulate):
            loss, sums = self.objective.loss(self.model, self.net, images, labels, where, self.compute, self.meter.sums)
            # Over processes gradients are averaged, which divides by their number.
            self.scaler.scale(loss * (self.ranks.count / self.plan.images(place))).backward()
        return sums

    @torch.no_grad()
    def _update(self, sums: Tensor) -> None:
        """Moves the weights, unless the loss or the gradient of this step or of one before it is not finite."""
        self.scaler.unscale_(self.optimizer)
        norm = self.flat.norm()
        finite = sums[0].isfinite()
        if not self.scaler.is_enabled():  # the scaler itself skips infinite gradients, and tries smaller ones
            finite = finite & norm.isfinite()
        self.bad_step = torch.where(finite, self.bad_step, self.bad_step.clamp(max=self.step))
        if self.config.clip_norm:
            self.flat.clip(norm, self.config.clip_norm)
        self.flat.remember()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.flat.keep_where(self.bad_step == NEVER)
        if self.flat_average is not None:
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))  # a short mean at first
            self.flat_average.follow(self.flat, 1 - decay)
        self.meter.add(sums)

    def _log_training(self, start: float, steps: int) -> None:
        """A line of metrics, and of progress, for the steps since `start`; waits for the device."""
        self._check_finite()
        sums = self._untold(start, steps)
        waiting, line = self.data_wait.read(sums.seconds)
        if line is not None:
            self.progress.warn(line)
        score, self.meter = self.meter.read(), Meter(self.compute.device, self.objective.score)
        speed = steps * self.config.batch_size / sums.seconds
        self._log("train", score, lr=self.lr, **self._timing(waiting, speed))
        self.progress.trained(self.step, sums, speed)

    def _untold(self, start: float, steps: int) -> Sums:
        """The sums of the `steps` steps since `start`, which no line of metrics has yet; waits for the device."""
        score = self.meter.read()
        return Sums.of(steps, time.perf_counter() - start, self.data_wait.waited(), score)

    def _timing(self, waiting: float, speed: float) -> dict:
        """What of a line of metrics differs from run to run."""
        timing = {"images_per_second": round(speed, 1), "waiting": round(waiting, 3)}
        if self.peak is not None:
            timing["mfu"] = float(f"{speed * self.flops / (self.peak * self.ranks.count):.3g}")
        if self.compute.device.type == "cuda":
            timing["memory_gib"] = round(torch.cuda.max_memory_allocated(self.compute.device) / 2**30, 2)
        return timing

    def _evaluate_epoch(self) -> None:
        """Evaluates the epoch that is over, and saves where that is due."""
        batch = self.config.batch_size // self.ranks.count
        batches = self.data.test_batches(batch, self.ranks)
        batches = self.monitor.first_of(batches)
        batches = self.parallel.fill_up(batches, batch, self.data.test_count, self.model, self.compute.device)
        tell = self.progress.testing(most_batches(self.data.test_count, batch, self.ranks))
        judge = self.objective.judge(self.ranks, self.data.test_count)
        score = evaluate(
            self.evaluated_model, batches, self.compute, self.ranks, self._pause, tell, judge, self.objective.score
        )
        self.evaluated += 1
        self._log("test", score, **self.monitor.rates(self.evaluated_model))
        if not math.isfinite(score.loss):
            raise TrainingError(
                f"the loss on the test images is not finite after step {self.step} of {self.steps} (epoch {self.evaluated}), "
                f"though that in training is; a new run with a lower --lr may help, from --init too; "
                f"the last good checkpoint is {self.checkpoints.newest_before(self.step) or 'none'}"
            )
        quality = self.objective.quality(score)
        best = quality > self.best
        self.score, self.best = score, max(self.best, quality)
        if self.evaluated % self.config.checkpoint_every == 0 or self.evaluated == self.config.epochs or best:
            self._save(best)
        reported = self.evaluated % self.config.checkpoint_every == 0 or self.evaluated == self.config.epochs
        self.progress.tested(score, f"epoch {self.evaluated} of {self.config.epochs}: test {score}" if reported else None)

    def _log(self, split: str, score: Score, **more) -> None:
        if self.ranks.first:
            epoch = self.evaluated + (split == "train")
            row = {"step": self.step, "epoch": epoch, "split": split, "loss": score.loss, **score.counts(), **more}
            self.run.log(**row)
            self.monitor.row(row)

    def _check_finite(self) -> None:
        bad_step = int(self.bad_step.item())
        if bad_step == NEVER:
            return
        lr = learning_rate_at(bad_step, self.plan.steps, self.config)
        raise TrainingError(
            f"the loss or its gradient is not finite at step {bad_step} of {self.steps} (epoch "
            f"{(bad_step - 1) // self.plan.steps + 1}, learning rate {lr:.3g}); a lower --lr or a longer --warmup may help; "
            f"the last good checkpoint is {self.checkpoints.newest_before(bad_step - 1) or 'none'}"
        )

    def _pause(self) -> None:
        """Between steps: saves where it is time to, and ends the run where a signal says so."""
        due = time.monotonic() - self._saved > 60 * self.config.checkpoint_minutes
        number, due = self.parallel.agree(self.signals.received, due)
        if number is not None:
            path = self._save(False)
            self.parallel.wait_for_first()
            again = called("train", "--resume", self.run.path)
            message = f"stopped by signal {number} after step {self.step}, saved as {path}; to go on: {again}"
            raise Stopped(number, message if self.ranks.first else "")
        if due:
            self._save(False)

    def _save(self, best: bool):
        """Writes a checkpoint, where this process takes part in that; its path."""
        if not self.parallel.saves():
            return None
        self._check_finite()
        state = self.state() | {"logged": self.run.logged() if self.ranks.first else 0}
        self._saved = time.monotonic()
        return self.checkpoints.save(self.model, self.step, best, state)


def hash_of(key: tuple[int, ...]) -> int:
    """A seed made of several numbers, the same everywhere."""
    mixed = 0
    for value in key:
        mixed = (mixed * 0x9E3779B97F4A7C15 + value + 1) % 2**63
    return mixed
