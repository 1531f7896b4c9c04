"""Fake quantization as one operator of torch, so that a quantizer stays one node of an exported graph.

In plain torch `qdetr::fake_quantize` is `Grid.round`, so an exported program runs, and computes the
fake-quant model's values to the last bit. What is written for a runtime is made from its arguments.
"""

import torch
from torch import Tensor

from qdetr_cli.fake_quant import Grid


@torch.library.custom_op("qdetr::fake_quantize", mutates_args=())
def _fake_quantize(
    x: Tensor, step: Tensor, zero: Tensor | None, qmin: int, qmax: int, axis: int | None, path: str
) -> Tensor:
    return Grid(step=step, zero=zero, qmin=qmin, qmax=qmax, shifted=False).round(x, axis)


@_fake_quantize.register_fake
def _(
    x: Tensor, step: Tensor, zero: Tensor | None, qmin: int, qmax: int, axis: int | None, path: str
) -> Tensor:
    return torch.empty_like(x)


FAKE_QUANTIZE = torch.ops.qdetr.fake_quantize.default


def fake_quantize(x: Tensor, grid: Grid, axis: int | None, path: str) -> Tensor:
    """Return x rounded to a grid with whole zero points, as one operator that bears the quantizer's path."""
    assert not grid.shifted, "a shifted grid has no integer zero point"
    y: Tensor = FAKE_QUANTIZE(x, grid.step, grid.zero, grid.qmin, grid.qmax, axis, path)
    return y
