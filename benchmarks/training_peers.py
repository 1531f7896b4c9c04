"""The same detectors under other toolkits' quantization-aware training: NNCF's, and torchao's PT2E."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from qdetr_cli.checkpoint import Detector
from qdetr_cli.data import Batch


class Outputs(nn.Module):
    """A detector as (B, 3, H, W) -> logits (B, Q, C), boxes (B, Q, 4)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and boxes."""
        found = self.model(pixel_values=pixel_values)
        return found.logits, found.pred_boxes


def nncf_model(detector: Detector, images: Batch) -> nn.Module:
    """NNCF's int8 of the model, in training mode: its fake quantization learns when it is trained."""
    import nncf

    one = images.pixel_values[:1]
    model: nn.Module = nncf.quantize(
        Outputs(detector.model.eval()),
        nncf.Dataset([one]),
        subset_size=1,
        preset=nncf.QuantizationPreset.MIXED,
    )
    return model.train()


def torchao_model(detector: Detector, images: Batch) -> nn.Module:
    """torchao's PT2E fake quantization for x86 of the exported graph, in training mode.

    Exported in eval mode, so without dropout: in training mode transformers' DETR branches on values.
    """
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(Outputs(detector.model).eval(), (images.pixel_values,)).module()
        quantizer = x86_inductor_quantizer.X86InductorQuantizer()
        quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config(is_qat=True))
        prepared: Any = prepare_qat_pt2e(exported, quantizer)
    model: nn.Module = move_exported_model_to_train(prepared)
    return model
