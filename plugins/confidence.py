"""Metric `confidence`: how sure the detector is, and how much it finds. Quantization often makes it less sure
first.

qdetr eval MODEL --data DATA --plugins plugins --metric confidence shows its numbers after the AP.
"""

from collections.abc import Sequence

from qdetr_cli import plugins
from qdetr_cli.data import DetectionData
from qdetr_cli.metrics import Detections


@plugins.register("metric", "confidence")
def confidence(data: DetectionData, detections: Sequence[Detections]) -> dict[str, float]:
    """Return the mean over images of the highest score, and of the number of scores from 0.5 up."""
    images = max(1, len(data.records))
    best = sum(float(found.scores.max()) for found in detections if len(found.scores))
    sure = sum(int((found.scores >= 0.5).sum()) for found in detections)
    return {"best_score": best / images, "sure_per_image": sure / images}
