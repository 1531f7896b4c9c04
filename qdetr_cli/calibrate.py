"""Calibration: every quantizer gets its step and offset from the values that it meets."""

from collections.abc import Callable

import torch
from torch import nn

from qdetr_cli.data import ImageSet, same_size_batches
from qdetr_cli.errors import DataError
from qdetr_cli.layers import QUANTIZED
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
    padding enters a range. `advance` is told of images done.
    """
    if len(images) == 0:
        raise DataError("calibrate: the split holds no image")
    for module in model.modules():
        if isinstance(module, QUANTIZED):
            module.calibrate_weight()
    inputs = {path: each for path, each in quantizers(model).items() if not path.endswith("weight_quantizer")}
    for quantizer in inputs.values():
        quantizer.start_observing()
    model.eval()
    for batch in same_size_batches(images, _chosen(len(images), spec), spec.batch_size):
        batch = batch.to(device)
        model(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask)
        advance(len(batch.image_ids))
    return tuple(path for path, quantizer in inputs.items() if not quantizer.finish_observing())


def _chosen(count: int, spec: Calibrate) -> list[int]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(spec.seed))
    return sorted(order[: spec.images].tolist())
