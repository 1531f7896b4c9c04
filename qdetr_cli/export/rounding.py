"""What rounding alone does to a model: its outputs under a noise as large as that of sums in another order.

A value that moves a little may fall to the next code of its grid, and what follows moves with it. That is no
error of a file, but how much of it there is depends on the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdetr_cli.layers import QuantConv2d
from qdetr_cli.quantizers import FakeQuantizer

NOISE = 2.0**-18  # rms of the noise, as a part of a value's rms
MARGIN = 12.0  # dB that a file may be worse than the model under that noise
ENOUGH = 60.0  # dB that are always good
BEST = 200.0  # dB that stand for no difference at all


@contextmanager
def rounding_noise(model: nn.Module, *, whole_biases: bool = False) -> Iterator[None]:
    """Add the noise of rounding to what each layer and each quantizer of activations gets.

    `whole_biases`: and to what convolutions give, whose biases ONNX Runtime's integer kernels have as whole
    numbers of steps of the products.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        noise = torch.randn(x.shape, generator=generator).to(x)
        return (x + noise * (NOISE * x.square().mean().sqrt()), *args[1:])

    hooks = [each.register_forward_pre_hook(moved) for each in _noisy(model)]
    if whole_biases:
        hooks += [each.register_forward_hook(_with_whole_bias) for each in _integer_convolutions(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def has_whole_biases(path: Path | None) -> bool:
    """Whether the runtime of a file rounds the biases of integer convolutions: ONNX Runtime does."""
    return path is not None and path.suffix == ".onnx"


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


def _integer_convolutions(model: nn.Module) -> Iterator[QuantConv2d]:
    for each in model.modules():
        if isinstance(each, QuantConv2d) and each.bias is not None and _on_integers(each):
            yield each


def _on_integers(layer: QuantConv2d) -> bool:
    sides = (layer.input_quantizer, layer.weight_quantizer)
    return all(each is not None and each.enabled for each in sides)


def _with_whole_bias(layer: QuantConv2d, _: Any, y: Tensor) -> Tensor:
    """What the layer gives, y (B, D_out, h, w), with its bias as a whole number of steps of the products."""
    assert layer.bias is not None
    assert layer.input_quantizer is not None
    assert layer.weight_quantizer is not None
    step = layer.input_quantizer.grid().step * layer.weight_quantizer.whole_grid(layer.weight).step
    return y + ((layer.bias / step).round() * step - layer.bias)[:, None, None]


def _noisy(model: nn.Module) -> Iterator[nn.Module]:
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantizer):
            if not path.endswith("weight_quantizer"):
                yield module
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            yield module
