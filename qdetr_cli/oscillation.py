"""Weights that flip between two grid numbers in training, and their freezing.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (2022, arXiv:2203.11086), algorithm 1:
a weight oscillates at a step where its grid number changes in the direction opposite to its last change.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qdetr_cli.errors import RecipeError
from qdetr_cli.layers import Quantized
from qdetr_cli.recipe import Oscillation


class OscillationFreezer:
    """Watches the weights of few bits after every step, and holds those that oscillate at their mean.

    Raises RecipeError where the model has no weight of so few bits.
    """

    def __init__(self, model: nn.Module, spec: Oscillation) -> None:
        self.spec = spec
        self.layers = {
            path: layer
            for path, layer in model.named_modules()
            if isinstance(layer, Quantized)
            and layer.weight_quantizer is not None
            and layer.weight_quantizer.format.bits <= spec.bits
        }
        if not self.layers:
            raise RecipeError(
                f"train.oscillation: this recipe gives no weight {spec.bits} bits or fewer, so nothing could "
                "be frozen; raise train.oscillation.bits or drop the section"
            )
        self.tracks = {path: _Track(_integers(layer)) for path, layer in self.layers.items()}

    @torch.no_grad()
    def update(self, done: float) -> None:
        """Look at the weights with the fraction `done` of the steps behind; freeze, and hold the frozen."""
        threshold = self.threshold(done)
        for path, layer in self.layers.items():
            quantizer, track = layer.weight_quantizer, self.tracks[path]
            assert quantizer is not None
            if not quantizer.enabled:
                continue
            track.follow(_integers(layer), self.spec.momentum)
            if threshold is not None:
                track.freeze(threshold)
            held = quantizer.dequantize(track.number.to(layer.weight.dtype)).to(layer.weight.dtype)
            layer.weight.copy_(torch.where(track.frozen, held, layer.weight))

    def threshold(self, done: float) -> float | None:
        """The flips per step above which a weight is frozen; None as long as none is."""
        spec = self.spec
        if done < spec.after:
            return None
        part = (done - spec.after) / max(1 - spec.after, 1e-9)
        return spec.end + 0.5 * (spec.start - spec.end) * (1 + math.cos(math.pi * min(part, 1.0)))

    @property
    def frozen(self) -> float:
        """The part of the watched weights that is frozen."""
        total = sum(track.frozen.numel() for track in self.tracks.values())
        return sum(int(track.frozen.sum()) for track in self.tracks.values()) / max(total, 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {path: vars(track) for path, track in self.tracks.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for path, track in self.tracks.items():
            for name, value in vars(track).items():
                value.copy_(state[path][name])


class _Track:
    """What is known of one weight's grid numbers; all tensors have the weight's shape."""

    def __init__(self, integers: Tensor) -> None:
        self.last = integers.to(torch.int16)
        self.direction = torch.zeros_like(self.last)  # of the last change: -1, 1, or 0 for none yet
        self.flips = torch.zeros_like(integers, dtype=torch.float32)  # per step, a moving average
        self.mean = integers.float()
        self.frozen = torch.zeros_like(integers, dtype=torch.bool)
        self.number = torch.zeros_like(self.last)  # of a frozen weight

    def follow(self, integers: Tensor, momentum: float) -> None:
        integers = integers.to(torch.int16)
        change = (integers - self.last).sign()
        flipped = (change != 0) & (change == -self.direction)
        self.flips.lerp_(flipped.float(), momentum)
        self.mean.lerp_(integers.float(), momentum)
        self.direction.copy_(torch.where(change != 0, change, self.direction))
        self.last.copy_(integers)

    def freeze(self, threshold: float) -> None:
        new = (self.flips > threshold) & ~self.frozen
        self.number.copy_(torch.where(new, self.mean.round().to(torch.int16), self.number))
        self.frozen |= new


def _integers(layer: Any) -> Tensor:
    integers: Tensor = layer.weight_quantizer.integers(layer.weight.detach())
    return integers
