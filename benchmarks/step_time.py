"""How much longer a training step is under quantization than in float: one model, one run, ratios.

    python -m benchmarks.step_time --side 320 --batch 2 --threads 1        (DETR-R50, random weights, w4a4)

Times are medians of whole steps (forward with auxiliary losses, and backward), with fake quantization
uncompiled and compiled. The float model runs its frozen batch norms, which the other has folded.
"""

import argparse
import copy
import statistics
import time

import torch
import transformers
from torch import nn

from qdetr_cli.checkpoint import Detector, load_config_model
from qdetr_cli.compiled import compiled_kernels
from qdetr_cli.data import Batch
from qdetr_cli.families import Family
from qdetr_cli.layers import Quantized
from qdetr_cli.losses import detection_loss
from qdetr_cli.plan import make_plan
from qdetr_cli.recipe import load_recipe
from qdetr_cli.rewrite import quantizers, rewrite
from qdetr_cli.trace import trace

STEPS = 5


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", default="w4a4")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    detector, images = detr_r50(), batch(arguments.batch, arguments.side)
    model = fake_quant(detector, arguments.recipe, images)
    reference = seconds(detector.model, detector.family, images)
    print(f"float       {reference:.3f} s")
    for compiled in (False, True):
        with compiled_kernels(compiled) as on:
            taken = seconds(model, detector.family, images)
        print(f"{'compiled  ' if on else 'uncompiled'}  {taken:.3f} s  {taken / reference:.2f} x float")


def detr_r50() -> Detector:
    """DETR-R50 with random weights."""
    backbone = transformers.ResNetConfig(out_features=["stage4"])
    config = transformers.DetrConfig(use_timm_backbone=False, backbone_config=backbone)
    return load_config_model(config.to_dict(), None)


def batch(images: int, side: int) -> Batch:
    """Noise with two objects in each image."""
    label = {
        "class_labels": torch.tensor([1, 2]),
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
    for module in model.modules():
        if isinstance(module, Quantized):
            module.calibrate_weight()
    watched = [each for path, each in quantizers(model).items() if not path.endswith("weight_quantizer")]
    for each in watched:
        each.start_observing()
    with torch.no_grad():
        model.eval()(pixel_values=images.pixel_values)
    for each in watched:
        each.finish_observing()
    return model


def seconds(model: nn.Module, family: Family, images: Batch) -> float:
    """The median of some steps, after one that is not counted."""
    model.train()
    taken = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        detection_loss(model, family, images, auxiliary=True).total.backward()
        taken.append(time.perf_counter() - began)
        model.zero_grad(set_to_none=True)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
