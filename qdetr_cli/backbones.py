"""What backbones bring along that the detector around them does not know.

A backbone of transformers' backbone API may stand in any family, so this is no matter of a family's row.
"""

from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from qdetr_cli.errors import CheckpointError

# Class names of attention modules that compute softmax(q k) v and can be captured at any size. Others, such
# as PVT's, are called with the size of the image as a number: their products stay float, and `trace` says so.
DENSE_ATTENTION = (
    "SwinAttention",
    "Swinv2SelfAttention",
    "Dinov2Attention",
    "Dinov2WithRegistersAttention",
    "DINOv3ViTAttention",
    "Attention",  # timm's vision transformers
)
STRIDE = 32  # pixels per cell of the coarsest feature map of all pyramids


def two_windows(config: Any) -> int:
    """The least side in pixels at which every stage has two windows of attention; 1 where none has windows.

    With one window alone a captured graph would not know that there can be more.
    """
    window = getattr(getattr(config, "backbone_config", None), "window_size", None)
    return STRIDE * (window + 1) if isinstance(window, int) else 1


def open_attention(model: nn.Module) -> None:
    """Have timm's attention compute its products one by one, as eager attention does, not fused in one."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010  # for mypy, a module's attributes are modules


def refuse_channels_last(model: Any) -> None:
    """Raise CheckpointError for a timm network whose maps are (B, H, W, C), not (B, C, H, W).

    Such a model cannot run in transformers either.
    """
    name = _timm_name(model)
    for path, module in model.named_modules() if name else ():
        if hasattr(module, "feature_info") and str(getattr(module, "output_fmt", "NCHW")).endswith("NHWC"):
            raise CheckpointError(
                f"backbone_config.backbone {name}: timm gives its feature maps with channels last, which "
                f"transformers does not expect ({path}); use the network of transformers itself, such as "
                "backbone_config.model_type swin"
            )


def lost_activations(model: Any) -> tuple[str, ...]:
    """A note where transformers has replaced batch norms of timm that activate by frozen ones that do not."""
    name = _timm_name(model)
    if not name or any(isinstance(module, BatchNormAct2d) for module in model.modules()):
        return ()
    config: Any = model.config.backbone_config
    if getattr(config, "freeze_batch_norm_2d", False):  # timm's own frozen ones activate
        return ()
    with torch.device("meta"):
        network = timm.create_model(name, features_only=config.features_only, out_indices=config.out_indices)
    lost = [
        path
        for path, module in network.named_modules()
        if isinstance(module, BatchNormAct2d) and not isinstance(module.act, nn.Identity)
    ]
    if not lost:
        return ()
    return (
        f"transformers freezes the batch norms of {name} without the activations that timm has in "
        f"{len(lost)} of them, so the backbone runs without these, here as there",
    )


def _timm_name(model: Any) -> str:
    """The name of a timm backbone, "" for another."""
    config: Any = getattr(model.config, "backbone_config", None)
    return str(config.backbone) if getattr(config, "model_type", "") == "timm_backbone" else ""
