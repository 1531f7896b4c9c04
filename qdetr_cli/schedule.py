"""What changes over the steps of a training: learning rates, the moving average, the order of the data."""

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from qdetr_cli.recipe import Train

STEP_DECAY = 0.1


def lr_scale(train: Train, step: int, total: int) -> float:
    """The factor on every learning rate at `step` (0-based) of `total`: linear warm-up, then the schedule."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    if train.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if train.schedule == "step":
        return 1.0 if done < train.step_at else STEP_DECAY
    return 1.0


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Stop the gradient of parameters whose path matches a pattern; the patterns that matched nothing.

    A shared parameter goes by each of its names.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        for name, parameter in names.items():
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*"):
                parameter.requires_grad_(False)
    return tuple(p for p in patterns if not any(fnmatchcase(n, p) or fnmatchcase(n, f"{p}.*") for n in names))


class MovingAverage:
    """An exponential moving average of parameters (buffers are copied), faster in the first steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards `model` by 1 - decay; decay is min(decay, (1 + t) / (10 + t)) after t updates."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, value in model.state_dict().items():
            if name in learned:
                self.tensors[name].lerp_(value, 1.0 - decay)
            else:
                self.tensors[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {"updates": self.updates, "tensors": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.updates = int(state["updates"])
        for name, value in self.tensors.items():
            value.copy_(state["tensors"][name])


class EpochSampler(Sampler[list[int]]):
    """Batches of indices of one epoch in an order that (seed, epoch) fixes, shared out over processes.

    `skip` leaves out batches that an interrupted run has done. Every process gets the same number of whole
    batches; what does not fill one is left for another epoch's order.
    """

    def __init__(
        self, length: int, batch: int, *, seed: int, epoch: int, skip: int, rank: int, world: int
    ) -> None:
        self.order = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        self.batch = min(batch, max(1, length // world))
        self.skip, self.rank, self.world = skip, rank, world
        self.batches = max(1, length // (self.batch * world))

    def __len__(self) -> int:
        return self.batches - self.skip

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(self.skip, self.batches):
            start = (index * self.world + self.rank) * self.batch
            yield self.order[start : start + self.batch].tolist()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators, so that a resumed run draws what the uninterrupted one would."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on drawing from where `state` was taken."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
