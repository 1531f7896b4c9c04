"""Average precision as COCO and as Pascal VOC count it, of all classes and per class."""

from qdetr_cli.metrics.coco import CocoScores, coco_metrics
from qdetr_cli.metrics.detections import EMPTY, Detections, mean_of
from qdetr_cli.metrics.summary import Metrics, measure
from qdetr_cli.metrics.voc import voc_average_precision

__all__ = [
    "EMPTY",
    "CocoScores",
    "Detections",
    "Metrics",
    "coco_metrics",
    "mean_of",
    "measure",
    "voc_average_precision",
]
