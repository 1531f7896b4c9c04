"""The detectors that times and sizes are measured on: configs with random weights, and noise to look at."""

import copy
from typing import Any

import torch
import transformers
from torch import nn

from qdetr_cli.calibrate import set_ranges
from qdetr_cli.checkpoint import Detector, load_config_model
from qdetr_cli.data import Batch
from qdetr_cli.plan import make_plan
from qdetr_cli.recipe import load_recipe
from qdetr_cli.rewrite import rewrite
from qdetr_cli.trace import trace

RT_DETR: dict[str, dict[str, Any]] = {
    "rt_detr_r18": {
        "backbone": {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
        "detector": {
            "decoder_layers": 3,
            "encoder_in_channels": [128, 256, 512],
            "hidden_expansion": 0.5,
        },
    },
    "rt_detr_r50": {
        "backbone": {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
        "detector": {},
    },
}
MODELS = ("detr_r50", *RT_DETR)


def random_detector(name: str) -> Detector:
    """The detector of MODELS with this name."""
    return detr_r50() if name == "detr_r50" else rt_detr(name)


def detr_r50() -> Detector:
    """DETR-R50 with random weights."""
    backbone = transformers.ResNetConfig(out_features=["stage4"])
    config = transformers.DetrConfig(use_timm_backbone=False, backbone_config=backbone)
    return load_config_model(config.to_dict(), None)


def rt_detr(name: str) -> Detector:
    """RT-DETR with random weights."""
    stages = ["stage2", "stage3", "stage4"]
    backbone = transformers.RTDetrResNetConfig(out_features=stages, **RT_DETR[name]["backbone"])
    config = transformers.RTDetrConfig(backbone_config=backbone, **RT_DETR[name]["detector"])
    return load_config_model(config.to_dict(), None)


def batch(images: int, side: int) -> Batch:
    """Noise with two objects in each image."""
    label = {
        "class_labels": torch.tensor([0, 1]),
        "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.3, 0.2]]),
    }
    return Batch(
        pixel_values=torch.randn(images, 3, side, side),
        pixel_mask=torch.ones(images, side, side, dtype=torch.int64),
        labels=[label] * images,
        image_ids=list(range(images)),
        sizes=torch.full((images, 2), side),
    )


def fake_quant(detector: Detector, recipe: str, images: Batch) -> nn.Module:
    """A copy of the model under the recipe, calibrated on the images."""
    model = copy.deepcopy(detector.model)
    height, width = images.pixel_values.shape[-2:]
    facts = trace(model, detector.family, (height, width))
    rewrite(model, make_plan(load_recipe(recipe), facts), facts)
    set_ranges(model, lambda: model(pixel_values=images.pixel_values))
    return model
