"""Random changes of training images: crop, flip, colour. Every draw comes from the generator that is passed.

Shape letters: H W pixels, T targets.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from qdetr_cli.recipe import Augment

_SMALLEST_CROP = 0.6  # of a side. DETR crops 384 to 600 pixels of a side resized to 400 to 600 and more
_HUE = 1 / 6  # of the strength: hue turns, so it needs less than brightness, contrast and saturation


def changed(
    pixels: Tensor, boxes: Tensor, augment: Augment, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Changed pixels (3, H, W), boxes (T', 4) inside them and which of the T targets they are, bool (T,).

    Boxes are corners in pixels. A box with a side of which less than half a pixel is left goes.
    """
    if rng.random() < augment.crop:
        pixels, boxes = _cropped(pixels, boxes, rng)
    if rng.random() < augment.flip:
        pixels, boxes = _flipped(pixels, boxes)
    if augment.color:
        pixels = _coloured(pixels, augment.color, rng)
    return pixels, *inside(boxes, pixels.shape[-2], pixels.shape[-1])


def inside(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Corners (T', 4) clipped to the image, and which of the T boxes still lie in it, bool (T,)."""
    limit = boxes.new_tensor([width, height, width, height])
    clipped = boxes.clamp(min=0).minimum(limit)
    smallest = (boxes[:, 2:] - boxes[:, :2]).clamp(max=1) / 2
    kept = ((clipped[:, 2:] - clipped[:, :2] >= smallest) & (clipped[:, 2:] > clipped[:, :2])).all(dim=1)
    return clipped[kept], kept


def _cropped(pixels: Tensor, boxes: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A window with sides drawn apart, as DETR's random-size crop, anywhere in the image."""
    full_height, full_width = pixels.shape[-2:]
    height = max(round(full_height * rng.uniform(_SMALLEST_CROP, 1)), 1)
    width = max(round(full_width * rng.uniform(_SMALLEST_CROP, 1)), 1)
    top, left = int(rng.integers(full_height - height + 1)), int(rng.integers(full_width - width + 1))
    window = transforms.crop(pixels, top, left, height, width)
    return window, boxes - boxes.new_tensor([left, top, left, top])


def _flipped(pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    left, top, right, bottom = boxes.unbind(-1)
    width = pixels.shape[-1]
    return transforms.horizontal_flip(pixels), torch.stack((width - right, top, width - left, bottom), dim=-1)


def _coloured(pixels: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation times 1 +- strength; hue turned by up to strength / 6 of a circle."""
    low = max(0.0, 1 - strength)
    pixels = transforms.adjust_brightness(pixels, float(rng.uniform(low, 1 + strength)))
    pixels = transforms.adjust_contrast(pixels, float(rng.uniform(low, 1 + strength)))
    pixels = transforms.adjust_saturation(pixels, float(rng.uniform(low, 1 + strength)))
    turn = min(strength * _HUE, 0.5)
    turned: Tensor = transforms.adjust_hue(pixels, float(rng.uniform(-turn, turn)))
    return turned
