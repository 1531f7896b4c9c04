"""COCO's numbers, by pycocotools, silently. Shape letter: C classes.

Where faster-coco-eval is installed (`pip install "qdetr[fast]"`) it counts instead: the same numbers to
1e-12, and much sooner from some thousand images on (`python -m benchmarks.coco_time`).
"""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from qdetr_cli.data import DetectionData
from qdetr_cli.metrics.detections import Detections, Reals, mean_of

_COCO_NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
_IOU50 = 0  # index of IoU 0.5 among COCO's ten thresholds


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoScores:
    """COCO's twelve numbers by name, and per class AP and AP50 (C,), -1 for a class without objects."""

    numbers: dict[str, float]
    ap: Reals
    ap50: Reals


class _Evaluation(COCOeval):  # type: ignore[misc]  # pycocotools has no types
    """pycocotools' evaluation that also ignores what the annotation marks so, and not only crowds."""

    def _prepare(self) -> None:
        super()._prepare()
        for annotations in self._gts.values():
            for annotation in annotations:
                annotation["ignore"] = annotation["iscrowd"] or annotation["difficult"]


def coco_metrics(data: DetectionData, detections: Sequence[Detections]) -> CocoScores:
    """COCO's twelve numbers and the AP of each class, computed by pycocotools on original pixels.

    Difficult objects of VOC data are ignored: neither counted nor punished. COCO data has no such mark, so
    its numbers are those of pycocotools on the file, even where a converter wrote one.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluation(_ground_truth(data), _found(detections), data)
        evaluation.params.imgIds = [record.image_id for record in data.records]
        evaluation.params.catIds = list(range(len(data.class_names)))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"]  # (10 IoU, 101 recall, C, 4 areas, 3 numbers of detections)
    precision = precision[:, :, :, 0, -1]  # (10, 101, C): of every area, with 100 detections
    return CocoScores(
        numbers={name: float(value) for name, value in zip(_COCO_NAMES, evaluation.stats[:12], strict=True)},
        ap=_class_means(precision),
        ap50=_class_means(precision[_IOU50 : _IOU50 + 1]),
    )


def _class_means(precision: Reals) -> Reals:
    """Mean over all but the last axis (..., C) of what is not -1, as pycocotools summarizes."""
    columns = precision.reshape(-1, precision.shape[-1]).T  # (C, n)
    return np.array([mean_of(column) for column in columns])


def _evaluation(truth: list[dict[str, Any]], found: list[dict[str, Any]], data: DetectionData) -> Any:
    """The evaluation that counts: the fast one knows of crowds, but of nothing else to ignore."""
    if importlib.util.find_spec("faster_coco_eval") and not any(each["difficult"] for each in truth):
        import faster_coco_eval

        known = [_index(each, data, faster_coco_eval.COCO) for each in (truth, found)]
        return faster_coco_eval.COCOeval_faster(*known, "bbox")
    return _Evaluation(_index(truth, data, COCO), _index(found, data, COCO), "bbox")


def _index(annotations: list[dict[str, Any]], data: DetectionData, kind: Any) -> Any:
    coco = kind()
    coco.dataset = {
        "images": [{"id": record.image_id} for record in data.records],
        "categories": [{"id": c, "name": name} for c, name in enumerate(data.class_names)],
        "annotations": [{"id": i + 1, **annotation} for i, annotation in enumerate(annotations)],
    }
    coco.createIndex()
    return coco


def _ground_truth(data: DetectionData) -> list[dict[str, Any]]:
    return [
        {
            "image_id": record.image_id,
            "category_id": int(record.labels[t]),
            "bbox": _xywh(record.boxes[t]),
            "area": float(record.area[t]),
            "iscrowd": int(record.crowd[t]),
            "difficult": int(record.difficult[t] and data.kind == "voc"),
        }
        for record in data.records
        for t in range(len(record.labels))
    ]


def _found(detections: Sequence[Detections]) -> list[dict[str, Any]]:
    found = []
    for one in detections:
        for box, score, label in zip(one.boxes, one.scores, one.labels, strict=True):
            left, top, width, height = _xywh(box)
            found.append(
                {
                    "image_id": one.image_id,
                    "category_id": int(label),
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "score": float(score),
                }
            )
    return found


def _xywh(box: Reals) -> list[float]:
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right - left, bottom - top]
