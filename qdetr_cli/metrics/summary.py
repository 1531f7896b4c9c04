"""All numbers of an evaluation, each by its name: COCO-AP50 and VOC-AP50 differ on the same detections."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qdetr_cli import plugins as registry
from qdetr_cli.data import DetectionData
from qdetr_cli.errors import DivergedError
from qdetr_cli.metrics.coco import coco_metrics
from qdetr_cli.metrics.detections import EMPTY, Detections, mean_of
from qdetr_cli.metrics.voc import voc_average_precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """All numbers of an evaluation, in 0..1; -1 where there is nothing to average over.

    `per_class`: class name -> ap, ap50, ap50_voc_area, ap50_voc07, objects. `plugins`: metric -> its numbers.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar_1: float
    ar_10: float
    ar_100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    ap50_voc_area: float
    ap50_voc07: float
    per_class: dict[str, dict[str, float]]
    plugins: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON: None in place of -1 and of numbers that are not finite."""
        cleaned: dict[str, Any] = _without_empty(asdict(self))
        return cleaned


def measure(data: DetectionData, detections: Sequence[Detections], metrics: Sequence[str] = ()) -> Metrics:
    """All metrics of the detections; an image without an entry counts as one where nothing was found.

    `metrics` names plugins of kind "metric", called with (data, detections). Raises DivergedError for a
    detection that is not finite.
    """
    _check(data, detections)
    coco = coco_metrics(data, detections)
    area = voc_average_precision(data, detections)
    eleven = voc_average_precision(data, detections, eleven_point=True)
    objects = np.zeros(len(data.class_names), dtype=np.int64)
    for record in data.records:
        np.add.at(objects, record.labels[~record.crowd], 1)
    per_class = {
        name: {
            "ap": float(coco.ap[c]),
            "ap50": float(coco.ap50[c]),
            "ap50_voc_area": area[name],
            "ap50_voc07": eleven[name],
            "objects": int(objects[c]),
        }
        for c, name in enumerate(data.class_names)
    }
    return Metrics(
        **coco.numbers,
        ap50_voc_area=mean_of(area.values()),
        ap50_voc07=mean_of(eleven.values()),
        per_class=per_class,
        plugins={name: dict(registry.get("metric", name)(data, detections)) for name in metrics},
    )


def _check(data: DetectionData, detections: Sequence[Detections]) -> None:
    ids = [one.image_id for one in detections]
    assert len(set(ids)) == len(ids), "one entry for each image"
    assert set(ids) <= {record.image_id for record in data.records}, "only images of the data"
    for one in detections:
        if not (np.isfinite(one.boxes).all() and np.isfinite(one.scores).all()):
            raise DivergedError(
                f"image {one.image_id}: the model found boxes or scores that are not finite. Its weights or "
                "steps are broken: evaluate an earlier checkpoint, or train with a lower learning rate."
            )


def _without_empty(value: Any) -> Any:
    """Nested numbers with None for -1 and for what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _without_empty(entry) for key, entry in value.items()}
    if isinstance(value, float):
        return None if value == EMPTY or not np.isfinite(value) else value
    return value
