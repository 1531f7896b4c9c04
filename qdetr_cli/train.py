"""Fine-tuning, float or under quantization: Hungarian loss, distillation, EMA, checkpoints that resume."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from qdetr_cli.compiled import compiled_kernels
from qdetr_cli.data import Batch, ImageSet, collate
from qdetr_cli.divergence import diverged, finite_means
from qdetr_cli.engine import accelerator, shared_out, training_mode
from qdetr_cli.errors import DivergedError, RecipeError, RunError
from qdetr_cli.families import Family
from qdetr_cli.metrics import Metrics
from qdetr_cli.objective import Objective, clipped
from qdetr_cli.oscillation import OscillationFreezer
from qdetr_cli.plan import Plan
from qdetr_cli.processes import average_gradients, from_first, largest, make_alike, rank, world
from qdetr_cli.progress import Position, Progress
from qdetr_cli.rates import parameter_groups
from qdetr_cli.recipe import Distill, Train
from qdetr_cli.runs import Journal, atomic_folder
from qdetr_cli.schedule import EpochSampler, MovingAverage, freeze, lr_scale
from qdetr_cli.signals import Interrupted, leave_stopping_to_parent, stop_signals
from qdetr_cli.stages import Stages

STATE = "state.pt"
LOG_EVERY = 20  # steps between two lines of metrics.jsonl
SMALLEST_SCALE = 2.0**-14  # of losses in fp16: gradients that need a smaller one fit at none
COMPILE_FROM = 300  # steps from which compiling, of 10 to 40 seconds, pays

Save = Callable[[nn.Module, Path, Metrics | None], None]
Evaluate = Callable[[nn.Module], Metrics]


class Watch(Protocol):
    """Who is told how the training goes."""

    def stepped(self, step: int, total: int, entry: dict[str, float]) -> None:
        """After every step: the loss terms and learning rate."""

    def evaluated(self, step: int, total: int, metrics: Metrics) -> None:
        """After every evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a training ended: the last evaluation, the best AP and its step, steps done and seconds."""

    last: Metrics
    best_ap: float
    best_step: int
    steps: int
    seconds: float


class Trainer:
    """One training of one model in one run folder (`last/`, `best/`, `metrics.jsonl`)."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        *,
        train: Train,
        distill: Distill,
        images: ImageSet,
        folder: Path,
        save: Save,
        evaluate: Evaluate,
        plan: Plan | None = None,
        teacher: nn.Module | None = None,
        same_origin: bool = True,
        device: str = "auto",
        watch: Watch | None = None,
    ) -> None:
        self.family, self.train, self.distill, self.images = family, train, distill, images
        self.folder, self.save, self.evaluate, self.watch = folder, save, evaluate, watch
        self.journal = Journal(folder / "metrics.jsonl")
        self.saved = time.monotonic()  # when a checkpoint was last written, or the training began
        self.accelerator = accelerator(train, device)
        self.device = self.accelerator.device
        self.model = _trainable(model.to(self.device), train)
        self.stages = Stages(self.model, plan, train.stages)
        self.average = None if train.ema is None else MovingAverage(self.model, train.ema)
        torch.manual_seed(train.seed)  # what the objective draws
        mentor = None if teacher is None else teacher.to(self.device)
        self.objective = Objective(model, family, train, distill, teacher=mentor, same_origin=same_origin)
        self.extras = self.objective.extras.to(self.device)
        make_alike(self.extras)
        self.oscillation = None if train.oscillation is None else OscillationFreezer(model, train.oscillation)
        groups = [*parameter_groups(self.model, family, train), *parameter_groups(self.extras, family, train)]
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(groups, fused=True))
        self.progress = Progress(
            model=self.model,
            extras=self.extras,
            optimizer=self.optimizer,
            average=self.average,
            oscillation=self.oscillation,
            scaler=self.accelerator.scaler,
            device=self.device,
        )
        self.wrapped = shared_out(self.model, self.device)

    @property
    def position(self) -> Position:
        """Where the training stands."""
        return self.progress.position

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        if len(self.images) < world():
            raise RunError(
                f"{len(self.images)} training images are fewer than the {world()} processes; launch fewer"
            )
        batches = len(self._sampler(epoch=0, skip=0))
        if batches < self.train.accumulate:
            raise RecipeError(
                f"train.accumulate: {self.train.accumulate} batches of {self.train.batch_size} are more than "
                f"{len(self.images)} training images give ({batches}); lower it or train.batch_size"
            )
        return batches // self.train.accumulate

    @property
    def total_steps(self) -> int:
        """Optimiser steps in the whole training."""
        if self.train.steps is not None:
            return self.train.steps
        return max(1, round(self.train.epochs * self.steps_per_epoch))

    def fit(self, *, resume: bool = False) -> Fit:
        """Train to the end, evaluating on the way. Raises DivergedError, and Interrupted after writing."""
        if resume:
            self.progress.load(self.folder / "last" / STATE)
            if self.position.step >= self.total_steps:  # a finished run: its end is evaluated once more
                self.position.evaluated = self.position.step - 1
            from_first(lambda: self.journal.rewind(self.position.step, self.position.evaluated))
        else:
            torch.manual_seed(self.train.seed + rank())  # dropout, denoising
        last: Metrics | None = None
        with stop_signals() as stop, compiled_kernels(self._compiles(), self.device.type):
            if self.position.evaluated < self.position.step and self._evaluation_is_due():
                last = self._evaluate()  # the run was stopped at the end of an epoch
            while self.position.step < self.total_steps:
                if signal := self._epoch(stop):
                    self._write_last(None)
                    raise Interrupted(signal)
                last = self._evaluate() if self._evaluation_is_due() else None
        assert last is not None, "the last step is evaluated"
        position = self.position
        return Fit(
            last=last,
            best_ap=position.best_ap,
            best_step=position.best_step,
            steps=position.step,
            seconds=position.seconds,
        )

    def _compiles(self) -> bool:
        wanted = self.train.compile
        return self.total_steps >= COMPILE_FROM if wanted == "auto" else wanted

    def _epoch(self, stop: list[int]) -> int:
        """Go on to the end of the current epoch, of the training, or until asked to stop: by which signal."""
        epoch, done = divmod(self.position.step, self.steps_per_epoch)
        began = time.monotonic() - self.position.seconds
        training_mode(self.wrapped, self.train)
        self.images.set_epoch(epoch)
        batches = iter(self._loader(epoch, skip=done * self.train.accumulate))
        for _ in range(min(self.steps_per_epoch - done, self.total_steps - self.position.step)):
            entry = self._step([next(batches).to(self.device) for _ in range(self.train.accumulate)])
            self.position.seconds = time.monotonic() - began
            self._tell(entry)
            signal, old = largest([stop[0] if stop else 0, self._saving_is_due()])
            if signal:
                return signal
            if old:
                self._write_last(None)
                training_mode(self.wrapped, self.train)
        return 0

    def _step(self, batches: list[Batch]) -> dict[str, float]:
        """One optimiser step over accumulated batches; the loss terms as numbers."""
        done = self.position.step / self.total_steps
        self.stages.enter(done)
        self.objective.enter(done)
        scale = lr_scale(self.train, self.position.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        totals: dict[str, float] = {}
        for index, batch in enumerate(batches):
            last = index + 1 == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                told = self._passes(batch, part=1 / len(batches))
            for name, value in told.items():
                totals[name] = totals.get(name, 0.0) + value / len(batches)
        self._update()
        return totals | {"lr": self.train.lr * scale}

    def _passes(self, batch: Batch, *, part: float) -> dict[str, float]:
        """Forward, and backward of a part of the loss; the loss and its terms."""
        try:
            with self.accelerator.autocast():
                loss, terms = self.objective(self.wrapped, batch)
            told = finite_means({"loss": loss.detach(), **terms})
        except DivergedError as error:
            raise diverged(error, self.model, self.position.step) from error
        self.accelerator.backward(loss * part)
        return told

    def _update(self) -> None:
        """Clip, step, hold oscillating weights, and move the average."""
        average_gradients(self.extras)  # DDP sees to the model's alone
        self.accelerator.unscale_gradients()
        learned = [*self.wrapped.parameters(), *self.extras.parameters()]
        if not clipped(learned, self.train.clip) and not self._will_be_left_out():
            raise diverged("the gradient is not finite", self.model, self.position.step, gradient=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        if self.oscillation is not None:
            self.oscillation.update(self.position.step / self.total_steps)
        if self.average is not None:
            self.average.update(self.model)

    def _will_be_left_out(self) -> bool:
        """Whether fp16's scaler skips this step and tries a smaller scale; there is an end to that."""
        return self.train.precision == "fp16" and self.accelerator.scaler.get_scale() > SMALLEST_SCALE

    def _tell(self, entry: dict[str, float]) -> None:
        step = self.position.step
        if step % LOG_EVERY == 0:
            line = {"step": step, "seconds": round(self.position.seconds, 1)} | entry
            from_first(lambda: self.journal.append(line))
        if self.watch is not None:
            self.watch.stepped(step, self.total_steps, entry)

    def _evaluation_is_due(self) -> bool:
        epoch, rest = divmod(self.position.step, self.steps_per_epoch)
        at_end = self.position.step >= self.total_steps
        return at_end or (rest == 0 and epoch % self.train.eval_every == 0)

    def _saving_is_due(self) -> bool:
        """Whether the last checkpoint is old, by the clock of this process."""
        minutes = self.train.save_minutes
        return minutes is not None and time.monotonic() - self.saved >= 60 * minutes

    def _evaluate(self) -> Metrics:
        """Metrics of the averaged model; `last/` is written, and `best/` when the AP is the best so far."""
        with self._averaged() as model:
            metrics = self.evaluate(model)
            ap = metrics.ap
            is_best = ap > self.position.best_ap
            if is_best:
                self.position.best_ap, self.position.best_step = ap, self.position.step
                from_first(lambda: self.save(model, self.folder / "best", metrics))
        self.position.evaluated = self.position.step
        line = {"step": self.position.step, "metrics": metrics.to_dict()}
        from_first(lambda: self.journal.append(line))
        self._write_last(metrics)  # after the journal: a run that is resumed here has all its lines
        if self.watch is not None:
            self.watch.evaluated(self.position.step, self.total_steps, metrics)
        return metrics

    @contextmanager
    def _averaged(self) -> Iterator[nn.Module]:
        """The model with the moving average's weights, for the duration of the block."""
        self.model.eval()
        if self.average is None:
            with self.stages.all_on():
                yield self.model
            return
        own = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.tensors)
        try:
            with self.stages.all_on():
                yield self.model
        finally:
            self.model.load_state_dict(own)

    def _write_last(self, metrics: Metrics | None) -> None:
        """`last/`: the averaged model as a loadable checkpoint, and beside it all that resuming needs."""
        state = self.progress.state_dict()
        from_first(lambda: self._write(state, metrics))
        self.saved = time.monotonic()

    def _write(self, state: dict[str, Any], metrics: Metrics | None) -> None:
        with atomic_folder(self.folder / "last") as draft:
            with self._averaged() as model:
                self.save(model, draft, metrics)
            torch.save(state, draft / STATE)  # the live weights are back in the tensors that it refers to

    def _sampler(self, *, epoch: int, skip: int) -> EpochSampler:
        return EpochSampler(
            len(self.images),
            self.train.batch_size,
            seed=self.train.seed,
            epoch=epoch,
            skip=skip,
            rank=rank(),
            world=world(),
        )

    def _loader(self, epoch: int, *, skip: int) -> "DataLoader[Any]":
        return DataLoader(
            self.images,
            batch_sampler=self._sampler(epoch=epoch, skip=skip),
            num_workers=self.train.workers,
            collate_fn=collate,
            worker_init_fn=leave_stopping_to_parent,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.train.seed),  # leaves the global state alone
        )


def _trainable(model: nn.Module, train: Train) -> nn.Module:
    unmatched = freeze(model, train.freeze)
    if unmatched:
        raise RecipeError(
            f"train.freeze: {', '.join(unmatched)} matches no parameter; see `qdetr inspect MODEL`"
        )
    return model
