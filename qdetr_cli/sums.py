"""Residual sums on a grid: the module that gives a sum, or a shortcut, rounds its output."""

from typing import Any

import torch
from torch import Tensor, nn

from qdetr_cli.attention import subclass
from qdetr_cli.quantizers import FakeQuantizer, make_quantizer
from qdetr_cli.recipe import QuantFormat


class QuantOutput(nn.Module):
    """Mixed into the class of any module that gives one tensor: the tensor passes a quantizer."""

    output_quantizer: FakeQuantizer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module gives, on the grid."""
        y: Tensor = self.output_quantizer(super().forward(*args, **kwargs))
        return y


def round_output(module: nn.Module, format: QuantFormat, device: torch.device) -> None:
    """Let a module round what it gives, in place; it keeps its names and gains `output_quantizer`."""
    quantizer = make_quantizer(format, axis=None, channels=1).to(device).train(module.training)
    module.add_module("output_quantizer", quantizer)
    if not isinstance(module, nn.Sequential):  # which runs whatever it holds, the quantizer last
        kind: Any = type(module)
        module.__class__ = subclass(QuantOutput, kind)
