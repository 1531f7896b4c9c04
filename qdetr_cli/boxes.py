"""Boxes as tensors: conversions, IoU and GIoU.

Two forms: centers (cx, cy, width, height) and corners (left, top, right, bottom). Coordinates are continuous:
a box that covers whole pixels 0 to 9 has corners 0 and 10. The unit is the caller's: pixels, or image parts.
"""

from torch import Tensor, stack

_TINY = 1e-12  # smallest area that is divided by: its square is still a float32, so gradients stay finite


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners (..., 4) of boxes given as centers (..., 4)."""
    cx, cy, width, height = boxes.unbind(-1)
    return stack((cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Centers (..., 4) of boxes given as corners (..., 4)."""
    left, top, right, bottom = boxes.unbind(-1)
    return stack(((left + right) / 2, (top + bottom) / 2, right - left, bottom - top), dim=-1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU (...) in -1..1 of corners that broadcast, a and b (..., 4).

    For all pairs give a (N, 1, 4) and b (1, M, 4). IoU minus the part of the enclosing box that the union
    leaves free (Rezatofighi et al. 2019, algorithm 1).
    """
    a, b = _precise(a), _precise(b)
    shared, union = _areas(a, b)
    hull = _span(a[..., :2].minimum(b[..., :2]), a[..., 2:].maximum(b[..., 2:]))
    return shared / union.clamp(min=_TINY) - (hull - union) / hull.clamp(min=_TINY)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU (...) in 0..1 of corners that broadcast, a and b (..., 4)."""
    shared, union = _areas(_precise(a), _precise(b))
    return shared / union.clamp(min=_TINY)


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (...) that the corners a and b share, and that they cover together."""
    shared = _span(a[..., :2].maximum(b[..., :2]), a[..., 2:].minimum(b[..., 2:]))
    return shared, _span(a[..., :2], a[..., 2:]) + _span(b[..., :2], b[..., 2:]) - shared


def _precise(boxes: Tensor) -> Tensor:
    """Half precision has too few digits for areas: computed in float32."""
    return boxes if boxes.element_size() >= 4 and boxes.is_floating_point() else boxes.float()


def _span(low: Tensor, high: Tensor) -> Tensor:
    """Areas (...) between two corners (..., 2); 0 where the high one is the lower."""
    size = (high - low).clamp(min=0)
    return size[..., 0] * size[..., 1]
