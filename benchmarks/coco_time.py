"""How long COCO's numbers take for as many images as its evaluation split has, by either library.

    python -m benchmarks.coco_time --images 5000

Random objects of 80 classes and 100 detections in each image. Whether faster-coco-eval is installed decides
which library counts; here both are asked in turn, and their numbers compared.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.ledger import commit
from qdetr_cli.data import DetectionData, Record
from qdetr_cli.metrics import Detections, coco_metrics

CLASSES, DETECTIONS = 80, 100


def main() -> None:
    """Print seconds, their ratio, and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise SystemExit('pip install "qdetr[fast]" first')
    data, found = random_case(arguments.images)
    began = time.perf_counter()
    fast = coco_metrics(data, found).numbers
    middle = time.perf_counter()
    with mock.patch("importlib.util.find_spec", return_value=None):
        slow = coco_metrics(data, found).numbers
    taken = {"faster_coco_eval": middle - began, "pycocotools": time.perf_counter() - middle}
    result = {
        "images": arguments.images,
        "seconds": {name: round(each, 2) for name, each in taken.items()},
        "ratio": round(taken["pycocotools"] / taken["faster_coco_eval"], 2),
        "largest_difference": max(abs(fast[name] - slow[name]) for name in fast),
        "commit": commit(),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def random_case(images: int) -> tuple[DetectionData, list[Detections]]:
    """A split of images of 640 pixels, and what might be detected on them, the objects nearly among it."""
    rng = np.random.default_rng(0)
    records, found = [], []
    for number in range(images):
        count = int(rng.integers(0, 14))
        corners, labels = _boxes(rng, count), rng.integers(0, CLASSES, count)
        records.append(
            Record(
                image=Path(f"{number}.jpg"),
                image_id=number,
                key=str(number),
                width=640,
                height=640,
                boxes=corners,
                labels=labels,
                difficult=np.zeros(count, dtype=np.bool_),
                crowd=rng.random(count) < 0.02,
                area=(corners[:, 2:] - corners[:, :2]).prod(axis=1),
            )
        )
        boxes, guesses = _boxes(rng, DETECTIONS), rng.integers(0, CLASSES, DETECTIONS)
        boxes[:count], guesses[:count] = corners + rng.normal(0, 4, (count, 4)), labels
        scores = rng.random(DETECTIONS)
        found.append(Detections(image_id=number, boxes=boxes, scores=scores, labels=guesses))
    data = DetectionData(
        kind="coco",
        root=Path(),
        split="val",
        class_names=tuple(str(each) for each in range(CLASSES)),
        category_ids=tuple(range(1, CLASSES + 1)),
        records=tuple(records),
    )
    return data, found


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Corners (count, 4)."""
    low = rng.uniform(0, 500, (count, 2))
    return np.concatenate([low, low + rng.uniform(5, 140, (count, 2))], axis=1)


if __name__ == "__main__":
    main()
