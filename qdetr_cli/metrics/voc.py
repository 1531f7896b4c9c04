"""Average precision as Pascal VOC counts it.

Shape letters: K detections of one image, T targets of one image, C classes.
"""

from collections.abc import Callable, Sequence

import numpy as np

from qdetr_cli.data import DetectionData, Record
from qdetr_cli.metrics.detections import EMPTY, Detections, Ints, Reals


def voc_average_precision(
    data: DetectionData, detections: Sequence[Detections], *, iou: float = 0.5, eleven_point: bool = False
) -> dict[str, float]:
    """AP of each class as Pascal VOC counts it, -1 for a class without objects.

    The area under the precision envelope (VOC 2010 and later), or the mean over 11 recalls (2007). A
    detection takes the object that it overlaps most, and is right when that IoU is above `iou` and the object
    still free. Difficult objects and crowds neither count nor punish. VOC counts pixels inclusively, so its
    widths have a + 1; continuous corners have it already, see `data.voc`.
    """
    by_image = {one.image_id: one for one in detections}
    scores: list[list[Reals]] = [[] for _ in data.class_names]
    hits: list[list[Ints]] = [[] for _ in data.class_names]
    objects = np.zeros(len(data.class_names), dtype=np.int64)
    for record in data.records:
        counted = ~(record.difficult | record.crowd)
        np.add.at(objects, record.labels[counted], 1)
        one = by_image.get(record.image_id)
        for label in np.unique(one.labels) if one is not None else ():
            assert one is not None
            of_class = one.labels == label
            order = np.argsort(-one.scores[of_class], kind="stable")
            scores[label].append(one.scores[of_class][order])
            hits[label].append(_hits(one.boxes[of_class][order], record, int(label), iou))
    summary = _eleven_point if eleven_point else _area_under
    averages = (_average(*one, summary) for one in zip(scores, hits, objects.tolist(), strict=True))
    return dict(zip(data.class_names, averages, strict=True))


def _hits(boxes: Reals, record: Record, label: int, iou: float) -> Ints:
    """1 right, 0 wrong, -1 ignored, for each of the boxes (K, 4), best score first."""
    targets = record.boxes[record.labels == label]
    ignored = (record.difficult | record.crowd)[record.labels == label]
    result = np.zeros(len(boxes), dtype=np.int64)
    if len(targets) == 0:
        return result
    overlaps = _overlaps(boxes, targets)  # (K, T)
    best = overlaps.argmax(axis=1)
    taken = np.zeros(len(targets), dtype=np.bool_)
    for k, t in enumerate(best):
        if overlaps[k, t] <= iou:
            continue
        result[k] = -1 if ignored[t] else int(not taken[t])
        taken[t] = True
    return result


def _overlaps(a: Reals, b: Reals) -> Reals:
    """IoU (K, T) of the corners a (K, 4) and b (T, 4)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)  # (K, T)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - shared
    overlaps: Reals = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlaps


def _average(
    scores: list[Reals], hits: list[Ints], objects: int, summary: Callable[[Reals, Reals], float]
) -> float:
    """AP of one class from the scores and hits of every image."""
    if objects == 0:
        return EMPTY
    if not scores:
        return 0.0
    order = np.argsort(-np.concatenate(scores), kind="stable")
    ranked = np.concatenate(hits)[order]
    right = np.cumsum(ranked[ranked >= 0] == 1)
    count = np.arange(1, len(right) + 1)
    return float(summary(right / objects, right / count))


def _area_under(recall: Reals, precision: Reals) -> float:
    """Area under the envelope: at each recall the best precision at this or a higher recall."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * envelope))


def _eleven_point(recall: Reals, precision: Reals) -> float:
    """Mean of the best precision at recalls of at least 0, 0.1, ..., 1."""
    points = np.arange(11) / 10  # k / 10 exactly as right / objects rounds, which steps of 0.1 are not
    return float(np.mean([precision[recall >= point].max(initial=0) for point in points]))
