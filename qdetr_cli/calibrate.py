"""Calibration: every quantizer gets its step and offset from the values that it meets."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from qdetr_cli.alignment import DistributionAlignment
from qdetr_cli.balance import Balance
from qdetr_cli.data import ImageSet, same_size_batches
from qdetr_cli.errors import DataError
from qdetr_cli.layers import Quantized
from qdetr_cli.quantizers import FakeQuantizer
from qdetr_cli.recipe import Calibrate
from qdetr_cli.rewrite import quantizers


@torch.no_grad()
def calibrate(
    model: nn.Module,
    images: ImageSet,
    spec: Calibrate,
    *,
    device: torch.device,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[str, ...]:
    """Set the range of every quantizer of `model`; the paths of those that saw no value.

    Weights are measured on themselves; then activations, unrounded but behind quantized weights, as they will
    be, on `spec.images` images drawn with `spec.seed`. Batches hold images of one processed size, so that no
    padding enters a range. Alignments and balances are fitted before, in a pass of their own, since ranges
    lie behind them. `advance` is told of images done, `passes(model)` times each.
    """
    if len(images) == 0:
        raise DataError("calibrate: the split holds no image")

    def show() -> None:
        for batch in same_size_batches(images, chosen(len(images), spec), spec.batch_size):
            batch = batch.to(device)
            model(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask)
            advance(len(batch.image_ids))

    return set_ranges(model, show)


@torch.no_grad()
def set_ranges(model: nn.Module, show: Callable[[], object]) -> tuple[str, ...]:
    """Set the range of every quantizer from what it meets while `show` runs the model; see `calibrate`."""
    for module in model.modules():
        if isinstance(module, Quantized):
            module.calibrate_weight()
    inputs = {path: each for path, each in quantizers(model).items() if not path.endswith("weight_quantizer")}
    silent: list[str] = []
    for watching in (_fitted_first(model), inputs):
        for module in watching.values():
            module.start_observing()
        if watching:
            switched = [each for each in inputs.values() if each.enabled and watching is not inputs]
            _run(model, show, off=switched)
        silent += [path for path, module in watching.items() if not module.finish_observing()]
    return tuple(silent)


def passes(model: nn.Module) -> int:
    """How many times `calibrate` shows each image to the model."""
    return 2 if _fitted_first(model) else 1


def _fitted_first(model: nn.Module) -> dict[str, DistributionAlignment | Balance]:
    """What changes values before they are rounded, and is fitted to them."""
    kinds = (DistributionAlignment, Balance)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def _run(model: nn.Module, show: Callable[[], object], off: Iterable[FakeQuantizer]) -> None:
    """One pass in eval mode, with the quantizers of `off` switched off."""
    model.eval()
    for quantizer in off:
        quantizer.enabled = False
    try:
        show()
    finally:
        for quantizer in off:
            quantizer.enabled = True


def chosen(count: int, spec: Calibrate) -> list[int]:
    """Which of `count` images calibration sees, in its order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(spec.seed))
    return sorted(order[: spec.images].tolist())
