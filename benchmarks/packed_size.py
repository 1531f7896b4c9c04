"""How small a packed DETR-R50 is under the shipped recipes: sizes of its tensors, and how many times less.

    python -m benchmarks.packed_size

Random weights: a size does not depend on them.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.detectors import detr_r50
from qdetr_cli.layers import Quantized
from qdetr_cli.manifest import WEIGHTS
from qdetr_cli.models import Model, quantized, save_packed
from qdetr_cli.recipe import load_recipe
from qdetr_cli.rewrite import quantizers

RECIPES = ("w8a8", "w4a4", "w3a3", "w2a2")


def main() -> None:
    """Print a line for each recipe."""
    torch.manual_seed(0)
    for recipe in RECIPES:
        detector = detr_r50()
        tensors = detector.model.state_dict().values()
        whole = 4 * sum(each.numel() for each in tensors if each.is_floating_point())
        model = quantized(Model(detector=detector), load_recipe(recipe), (64, 64), lambda text: None)
        packed = packed_bytes(model)
        print(f"{recipe}  {whole / 1e6:.1f} MB  {packed / 1e6:.2f} MB  {whole / packed:.2f} times less")


def packed_bytes(model: Model) -> int:
    """The size of its packed weights; steps of activations, which are not calibrated here, stay at 1."""
    for module in model.module.modules():
        if isinstance(module, Quantized):
            module.calibrate_weight()
    for each in quantizers(model.module).values():
        each.calibrated.fill_(True)
    with tempfile.TemporaryDirectory() as folder:
        save_packed(model, Path(folder) / "packed")
        return (Path(folder) / "packed" / WEIGHTS).stat().st_size


if __name__ == "__main__":
    main()
