"""What rounding alone does to a model: its outputs under a noise as large as that of sums in another order.

A value that moves a little may fall to the next code of its grid, and what follows moves with it. That is no
error of a file, but how much of it there is depends on the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdetr_cli.quantizers import FakeQuantizer

NOISE = 2.0**-18  # rms of the noise, as a part of a value's rms
MARGIN = 12.0  # dB that a file may be worse than the model under that noise
ENOUGH = 60.0  # dB that are always good
BEST = 200.0  # dB that stand for no difference at all


@contextmanager
def rounding_noise(model: nn.Module) -> Iterator[None]:
    """Add the noise of rounding to what each layer and each quantizer of activations gets."""
    generator = torch.Generator().manual_seed(0)

    def moved(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        noise = torch.randn(x.shape, generator=generator).to(x)
        return (x + noise * (NOISE * x.square().mean().sqrt()), *args[1:])

    hooks = [each.register_forward_pre_hook(moved) for each in _noisy(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sqnr(x: Tensor, y: Tensor) -> float:
    """10 log10(sum x^2 / sum (x - y)^2), in dB, at most BEST."""
    signal, noise = float(x.double().square().sum()), float((x.double() - y.double()).square().sum())
    return BEST if noise == 0 else float(min(BEST, 10 * np.log10(max(signal, 1e-300) / noise)))


def least(rounding: float) -> float:
    """The SQNR below which rounding is no explanation, where the model under noise has `rounding`; dB."""
    return min(rounding - MARGIN, ENOUGH)


def decibels(value: float) -> str:
    """An SQNR in words."""
    return "identical" if value >= BEST else f"{value:.0f} dB"


def _noisy(model: nn.Module) -> Iterator[nn.Module]:
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantizer):
            if not path.endswith("weight_quantizer"):
                yield module
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            yield module
