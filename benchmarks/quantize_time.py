"""How long `qdetr quantize` and `qdetr eval --ladder` take, over the plain forward passes that they need.

    python -m benchmarks.quantize_time --model detr_r50 --images 128 --side 640

Random weights, images of noise on disk. The forward passes run alone, without gradient, on the batches that
calibration makes, read from disk as it reads them; the same process, one after the other. The goal for
`quantize` is 3 times.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.detectors import MODELS, random_detector
from qdetr_cli import pipeline, report
from qdetr_cli.data import ImageSet, open_data, same_size_batches
from qdetr_cli.models import Source, open_model
from qdetr_cli.recipe import load_recipe
from qdetr_cli.results import DataSource
from qdetr_cli.running import evaluate


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="detr_r50")
    parser.add_argument("--recipe", default="w4a4")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--side", type=int, default=640)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ladder", action="store_true", help="measure the ladder too")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = _measured(Path(folder), arguments)
    print(json.dumps(found, indent=2))
    if arguments.out:
        settings = {name: value for name, value in vars(arguments).items() if name != "out"}
        content = {"settings": settings, "torch": torch.__version__, **found}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _measured(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    detector = random_detector(arguments.model)
    detector.model.save_pretrained(folder / "model")
    size = {"shortest_edge": arguments.side, "longest_edge": arguments.side}
    if detector.family.squash:
        size = {"height": arguments.side, "width": arguments.side}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps({"size": size}), encoding="utf-8")
    data = _scenes(folder / "data", arguments.images, arguments.side)
    page, source = report.Page(json=True), Source(str(folder / "model"))
    settings = [f"calibrate.images={arguments.images}"]
    plain = _forward(source, data, load_recipe(arguments.recipe, settings).calibrate.batch_size)
    began = time.perf_counter()
    pipeline.quantize(
        source,
        recipe=arguments.recipe,
        data=data,
        out=folder / "quantized",
        overrides=settings,
        measured=False,
        listener=page,
    )
    taken = time.perf_counter() - began
    found = {"forward_s": plain, "quantize_s": taken, "quantize_over_forward": taken / plain}
    if arguments.ladder:
        quantized = Source(str(folder / "quantized"))
        began = time.perf_counter()
        evaluate(quantized, data=data, batch_size=8, workers=0, listener=page)
        once = time.perf_counter() - began
        began = time.perf_counter()
        climbed = evaluate(quantized, data=data, ladder=True, batch_size=8, workers=0, listener=page).ladder
        taken = time.perf_counter() - began
        found |= {"eval_s": once, "ladder_s": taken, "rungs": len(climbed), "ladder_over_eval": taken / once}
    return {name: round(value, 3) for name, value in found.items()}


def _forward(source: Source, data: DataSource, size: int) -> float:
    """Seconds of plain forward passes of the float model over all images."""
    model = open_model(source, lambda text: None)
    images = ImageSet(
        open_data(data.path, split=data.train), model.detector.processor, (0,), augment=None, seed=0
    )
    module = model.module.eval()
    began = time.perf_counter()
    with torch.no_grad():
        for batch in same_size_batches(images, list(range(len(images))), size):
            module(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask)
    return time.perf_counter() - began


def _scenes(folder: Path, images: int, side: int) -> DataSource:
    """A COCO root: noise with one object in each image."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).mkdir()
        records, objects = [], []
        for number in range(images):
            name = f"{number:04}.jpg"
            noise = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((side, side)).save(folder / split / name)
            records.append({"id": number, "file_name": name, "width": side, "height": side})
            box = {"bbox": [10, 10, 90, 90], "area": 8100, "iscrowd": 0}
            objects.append({"id": number + 1, "image_id": number, "category_id": 0, **box})
        content = {"images": records, "annotations": objects, "categories": [{"id": 0, "name": "LABEL_0"}]}
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    return DataSource(folder)


if __name__ == "__main__":
    main()
