"""Images that belong to no data set, for prediction."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from qdetr_cli.data.batches import Batch, Sample, collate
from qdetr_cli.data.images import Processor, prepare_image, read_image
from qdetr_cli.errors import DataError

NOTHING = 0  # the image id where there is no data set


def image_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The image files among `paths`, and those in folders among them (not their subfolders), in order.

    Raises DataError for a path that does not exist and a folder without images.
    """
    suffixes = set(Image.registered_extensions())
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such image or folder")
        inside = (
            (each for each in sorted(path.iterdir()) if each.suffix.lower() in suffixes)
            if path.is_dir()
            else [path]
        )
        before = len(found)
        found += [each for each in inside if each.is_file()]
        if len(found) == before:
            raise DataError(f"{path}: holds no image ({', '.join(sorted(suffixes)[:8])}, ...)")
    return tuple(dict.fromkeys(found))


def single_image(path: Path, processor: Processor) -> Batch:
    """A batch of one image without labels, its `sizes` the image's own (H, W)."""
    image = read_image(path)
    nothing = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    sample = Sample(
        pixel_values=prepare_image(image, processor),
        labels=nothing,
        image_id=NOTHING,
        size=(image.height, image.width),
        pad_to=processor.pad_to,
    )
    return collate([sample])
