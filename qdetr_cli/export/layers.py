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

from qdetr_cli.export.probes import Array, Arrays, Probe, in_order, probe
from qdetr_cli.export.program import OUTPUTS
from qdetr_cli.export.rounding import BEST, decibels, has_whole_biases, least, rounding_noise, sqnr
from qdetr_cli.export.ties import LowerIndexFirst
from qdetr_cli.quantizers import FakeQuantizer

Values = dict[str, Tensor]
SURE = (20.0, 6.0)  # dB that an order of dimensions must reach, and be better than any other
LIKELY = (3.0, 0.0)  # the same for the values of a layer that is wrong
MOVED = 0.02  # part of the codes of one layer that rounding may always move, by one
MOST = 0.2  # part that it may move where it moves half as many in the model itself
FEW = 3  # codes that it always may


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParity:
    """How near a file is to its model in what one quantizer gives."""

    path: str  # of the quantizer; `:1`, `:2`.. where it is called again
    sqnr: float  # dB; with what came before, as the file computed it
    rounding: float  # dB; the same of the model itself under the noise of rounding
    moved: float | None  # part of the codes that this layer alone moves; None: it cannot be seen alone
    furthest: float  # how many codes the furthest of them is away
    most: float  # part of the codes that rounding may move

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference."""
        if self.moved is None:
            return self.sqnr >= least(self.rounding)
        return self.moved == 0 or (self.moved <= self.most and self.furthest < 1.5)

    def __str__(self) -> str:
        """One line."""
        alone = "" if self.moved is None else f", alone it moves {100 * self.moved:.2g} % of its codes"
        return f"{self.path}: {decibels(self.sqnr)} ({decibels(self.rounding)}){alone}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """The quantizers of activations that file and model have in common, in the order in which they run."""

    layers: tuple[LayerParity, ...]
    outputs: Arrays  # what the file gives from the true codes, by name; none where it cannot be given them


@torch.no_grad()
def inside(model: nn.Module, path: Path, given: Mapping[str, Tensor]) -> Inside:
    """How file and model compare inside.

    `given` is one image: pixel_values (1, 3, H, W) and pixel_mask (1, H, W), at most of the file's size.
    """
    opened = probe(path)
    given = {name: each.expand(opened.images, *each.shape[1:]) for name, each in given.items()}
    wanted, steps = model_values(model, given)
    found = opened.values(given)
    orders, alone = _told_apart(opened, given, wanted, found)
    with rounding_noise(model, whole_biases=has_whole_biases(path)):
        noisy, _ = model_values(model, given)
        noisy_alone, _ = model_values(model, given, true=wanted)
    compared = tuple(
        LayerParity(
            path=key,
            sqnr=_nearest(wanted[key], found[key]),
            rounding=sqnr(wanted[key], noisy[key]),
            **_alone(wanted[key], steps[key], order, alone.get(key), noisy_alone[key]),
        )
        for key, order in orders.items()
    )
    return Inside(layers=compared, outputs={name: alone[name] for name in OUTPUTS if name in alone})


def model_values(
    model: nn.Module, given: Mapping[str, Tensor], true: Values | None = None
) -> tuple[Values, Values]:
    """What each quantizer of activations gives for these images, and its steps, shaped to fit, by its key.

    What follows a quantizer gets its value in `true`, where that is given, instead.
    """
    values: Values = {}
    steps: Values = {}
    with _recorded(model, values, steps, true or {}), LowerIndexFirst():
        model(**given)
    return values, steps


@contextmanager
def _recorded(model: nn.Module, values: Values, steps: Values, true: Values) -> Iterator[None]:
    calls: dict[str, int] = {}

    def record(module: FakeQuantizer, _: Any, result: Tensor, path: str) -> Tensor | None:
        count = calls[path] = calls.get(path, -1) + 1
        key = f"{path}:{count}" if count else path
        shape = [1] * result.dim()
        if module.axis is not None:
            shape[module.axis] = -1
        values[key], steps[key] = result.detach().clone(), module.grid().step.reshape(shape)
        return true.get(key)

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


Orders = dict[str, tuple[int, ...] | None]


def _told_apart(
    opened: Probe, given: Mapping[str, Tensor], wanted: Values, found: Arrays
) -> tuple[Orders, Arrays]:
    """How the file orders the dimensions of each quantizer, None where it cannot be told, and what each gives
    where all others that can be told gave their true values.

    What the file computed by itself may be too far from the model to tell, where it chose other queries; what
    it computes from true values is not.
    """
    orders = {key: _order(value, found[key]) for key, value in wanted.items() if key in found}
    alone = _after(opened, given, wanted, orders)
    for limits in (SURE, LIKELY):
        while told := _more(wanted, alone, orders, limits):
            orders |= told
            alone = _after(opened, given, wanted, orders)
    return orders, alone


def _after(opened: Probe, given: Mapping[str, Tensor], wanted: Values, orders: Orders) -> Arrays:
    """What the file gives from the true codes of the quantizers whose order is known."""
    known = {key: _turned(wanted[key], order) for key, order in orders.items() if order is not None}
    return opened.values_after(given, known)


def _more(wanted: Values, alone: Arrays, orders: Orders, limits: tuple[float, float]) -> Orders:
    """The orders that can be told from what the file gives from true codes, and could not be before."""
    open_ = [key for key, order in orders.items() if order is None and key in alone]
    told = {key: _order(wanted[key], alone[key], limits) for key in open_}
    return {key: order for key, order in told.items() if order is not None}


def _order(wanted: Tensor, found: Array, limits: tuple[float, float] = SURE) -> tuple[int, ...] | None:
    """The order of the dimensions of `found` that makes it most like what is wanted; None if none does."""
    scores = sorted(((sqnr(wanted, value), order) for order, value in in_order(wanted, found)), reverse=True)
    if len(scores) < 2:
        return scores[0][1] if scores else None
    (best, order), (second, _) = scores[:2]
    return order if best > limits[0] and (best == BEST or best - second > limits[1]) else None


def _turned(wanted: Tensor, order: tuple[int, ...]) -> Array:
    """A value of the model with its dimensions as the file has them."""
    turned: Array = wanted.permute(*np.argsort(order).tolist()).contiguous().numpy()
    return turned


def _nearest(wanted: Tensor, found: Array) -> float:
    """The SQNR of a value whose dimensions may stand in another order; 0 dB where they cannot be told."""
    return max((sqnr(wanted, value) for _, value in in_order(wanted, found)), default=0.0)


def _alone(
    wanted: Tensor, step: Tensor, order: tuple[int, ...] | None, found: Array | None, noisy: Tensor
) -> dict[str, Any]:
    """How many codes the layer moves, how far, and how many it may, where all before it were true."""
    if order is None or found is None:
        return {"moved": None, "furthest": 0.0, "most": 0.0}
    away = ((torch.from_numpy(found).permute(order) - wanted) / step).abs()
    by_rounding = ((noisy - wanted) / step).abs().gt(0.5).double().mean().item()
    return {
        "moved": away.gt(0.5).double().mean().item(),
        "furthest": float(away.max()),
        "most": max(FEW / away.numel(), MOVED, min(2 * by_rounding, MOST)),
    }
