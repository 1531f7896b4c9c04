"""The quantizers of a file beside those of its model: which layer is the first that deviates.

Each layer is judged by itself where that can be: the file gets, in place of the codes that it computed, those
of the model, so that no layer has to answer for what came before. Then a wrong layer moves most of its codes,
and rounding a few of them by one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdetr_cli.export.probes import Array, Arrays, in_order, probe
from qdetr_cli.export.rounding import decibels, least, rounding_noise, sqnr
from qdetr_cli.export.ties import LowerIndexFirst
from qdetr_cli.quantizers import FakeQuantizer

Values = dict[str, Tensor]
KNOWN = 3.0  # dB from which on a value of a file is taken for that of the model
MOVED = 0.02  # part of the codes of one layer that rounding may move, by one
FEW = 3  # codes that it always may


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParity:
    """How near a file is to its model in what one quantizer gives."""

    path: str  # of the quantizer; `:1`, `:2`.. where it is called again
    sqnr: float  # dB; with what came before, as the file computed it
    rounding: float  # dB; the same of the model itself under the noise of rounding
    moved: float | None  # part of the codes that this layer alone moves; None: it cannot be seen alone
    furthest: float  # how many codes the furthest of them is away

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference."""
        if self.moved is None:
            return self.sqnr >= least(self.rounding)
        return self.moved == 0 or self.furthest < 1.5

    def __str__(self) -> str:
        """One line."""
        alone = "" if self.moved is None else f", alone it moves {100 * self.moved:.2g} % of its codes"
        return f"{self.path}: {decibels(self.sqnr)} ({decibels(self.rounding)}){alone}"


@torch.no_grad()
def layers(model: nn.Module, path: Path, given: Mapping[str, Tensor]) -> tuple[LayerParity, ...]:
    """The quantizers of activations that file and model have in common, in the order in which they run.

    `given` is one image: pixel_values (1, 3, H, W) and pixel_mask (1, H, W), at most of the file's size.
    """
    opened = probe(path)
    given = {name: each.expand(opened.images, *each.shape[1:]) for name, each in given.items()}
    wanted, steps = model_values(model, given)
    found = opened.values(given)
    orders = {key: _order(value, found[key]) for key, value in wanted.items() if key in found}
    true = {key: _turned(wanted[key], order) for key, order in orders.items() if order is not None}
    alone = opened.values_after(given, true)
    with rounding_noise(model):
        noisy, _ = model_values(model, given)
    return tuple(
        LayerParity(
            path=key,
            sqnr=_nearest(wanted[key], found[key]),
            rounding=sqnr(wanted[key], noisy[key]),
            **_alone(key, wanted[key], steps[key], order, alone),
        )
        for key, order in orders.items()
    )


def model_values(model: nn.Module, given: Mapping[str, Tensor]) -> tuple[Values, Values]:
    """What each quantizer of activations gives for these images, and its steps, shaped to fit, by its key."""
    values: Values = {}
    steps: Values = {}
    with _recorded(model, values, steps), LowerIndexFirst():
        model(**given)
    return values, steps


@contextmanager
def _recorded(model: nn.Module, values: Values, steps: Values) -> Iterator[None]:
    calls: dict[str, int] = {}

    def record(module: FakeQuantizer, _: Any, result: Tensor, path: str) -> None:
        count = calls[path] = calls.get(path, -1) + 1
        key = f"{path}:{count}" if count else path
        shape = [1] * result.dim()
        if module.axis is not None:
            shape[module.axis] = -1
        values[key], steps[key] = result.detach().clone(), module.grid().step.reshape(shape)

    hooks = [
        module.register_forward_hook(partial(record, path=module.path))
        for path, module in model.named_modules()
        if isinstance(module, FakeQuantizer) and not path.endswith("weight_quantizer")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _order(wanted: Tensor, found: Array) -> tuple[int, ...] | None:
    """The order of the dimensions of `found` that makes it most like what is wanted; None if none does."""
    scores = [(sqnr(wanted, value), order) for order, value in in_order(wanted, found)]
    best = max(scores, default=(0.0, ()))
    return best[1] if best[0] > KNOWN or len(scores) == 1 else None


def _turned(wanted: Tensor, order: tuple[int, ...]) -> Array:
    """A value of the model with its dimensions as the file has them."""
    turned: Array = wanted.permute(*np.argsort(order).tolist()).contiguous().numpy()
    return turned


def _nearest(wanted: Tensor, found: Array) -> float:
    """The SQNR of a value whose dimensions may stand in another order; 0 dB where they cannot be told."""
    return max((sqnr(wanted, value) for _, value in in_order(wanted, found)), default=0.0)


def _alone(
    key: str, wanted: Tensor, step: Tensor, order: tuple[int, ...] | None, alone: Arrays
) -> dict[str, Any]:
    """How many codes the layer moves, and how far, where all before it were true."""
    if order is None or key not in alone:
        return {"moved": None, "furthest": 0.0}
    away = ((torch.from_numpy(alone[key]).permute(order) - wanted) / step).abs()
    moved = (away > 0.5).sum().item()
    few = moved <= max(FEW, MOVED * away.numel())
    return {
        "moved": moved / away.numel(),
        "furthest": float(away.max()) if few else max(2.0, float(away.max())),
    }
