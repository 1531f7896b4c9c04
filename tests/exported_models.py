"""A detector of a few layers with a quantizer of every kind, and ONNX files run without optimization."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from qdetr_cli.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from qdetr_cli.quantizers import FakeQuantizer, make_quantizer
from qdetr_cli.recipe import QuantFormat, Slot, resolve_format
from qdetr_cli.recipe.formats import Format
from qdetr_cli.rewrite import quantizers

SIZE = (12, 8)
HEADS, WIDTH = 2, 8


def number_format(slot: Slot, bits: int, **stated: Any) -> QuantFormat:
    return resolve_format(slot, Format(bits=bits, **stated))


class Toy(nn.Module):
    """Convolutions, attention with steps per head, and two heads: (B, L, 3) and (B, L, 4)."""

    def __init__(
        self, bits: int = 4, quantizer: str = "lsq", options: dict | None = None, mid_rise: bool = False
    ) -> None:
        super().__init__()
        kind = {"quantizer": {"name": quantizer, "options": options or {}}}
        weight = number_format("weight", bits, mid_rise=mid_rise, **kind)
        activation = number_format("input", bits)
        self.stem = QuantConv2d.from_float(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), weight=weight, input=number_format("input", 8)
        )
        self.deep = QuantConv2d.from_float(
            nn.Conv2d(6, 6, 3, padding=1, groups=2), weight=weight, input=activation
        )
        self.up = QuantConvTranspose2d.from_float(
            nn.ConvTranspose2d(6, WIDTH, 2, stride=2, groups=2), weight=weight, input=activation
        )
        self.tokens = QuantLinear.from_float(nn.Linear(WIDTH, WIDTH), weight=weight, input=activation)
        self.classes = QuantLinear.from_float(nn.Linear(WIDTH, 3), weight=weight, input=activation)
        self.boxes = QuantLinear.from_float(nn.Linear(WIDTH, 4), weight=weight, input=activation)
        for slot in ("q", "k", "v", "probs"):
            format = number_format(slot, bits)
            setattr(self, f"{slot}_quantizer", make_quantizer(format, axis=1, channels=HEADS))
        for path, each in quantizers(self).items():
            each.path = path

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> SimpleNamespace:
        x = self.up(self.deep(self.stem(pixel_values).relu()).relu())  # (B, D, H, W)
        x = self.tokens(x.flatten(2).transpose(1, 2))  # (B, L, D)
        heads = x.unflatten(2, (HEADS, -1)).transpose(1, 2)  # (B, N, L, d)
        scores = self.q_quantizer(20 * heads) @ self.k_quantizer(heads.transpose(2, 3))
        mixed = self.probs_quantizer(scores.softmax(-1)) @ self.v_quantizer(heads)
        x = x + mixed.transpose(1, 2).flatten(2)
        return SimpleNamespace(logits=self.classes(x), pred_boxes=self.boxes(x).sigmoid())


def images(count: int = 2, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(count, 3, *SIZE, generator=generator),
        "pixel_mask": torch.ones(count, *SIZE, dtype=torch.int64),
    }


def toy(bits: int = 4, **options: Any) -> Toy:
    torch.manual_seed(0)
    model = Toy(bits, **options)
    return calibrated(model)


@torch.no_grad()
def calibrated(model: Toy) -> Toy:
    for layer in (model.stem, model.deep, model.up, model.tokens, model.classes, model.boxes):
        layer.calibrate_weight()
    activations = [each for path, each in quantizers(model).items() if not path.endswith("weight_quantizer")]
    for each in activations:
        each.start_observing()
    model.eval()(**images(4))
    for each in activations:
        each.finish_observing()
    return model


def asymmetric(model: nn.Module) -> list[FakeQuantizer]:
    return [each for each in quantizers(model).values() if each.offset is not None]


def run_plain(model: onnx.ModelProto, given: dict[str, Tensor]) -> list[Tensor]:
    """The outputs in ONNX Runtime, node by node as they stand in the model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {each.name: given[each.name].numpy() for each in session.get_inputs()}
    return [torch.from_numpy(np.asarray(each)) for each in session.run(None, feed)]
