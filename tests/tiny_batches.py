"""A batch of images of noise with random objects, for tests of losses."""

import torch

from qdetr_cli.data import Batch


def batch(objects: tuple[int, ...] = (2, 1), size: tuple[int, int] = (64, 96), classes: int = 3) -> Batch:
    """Images (H, W) of `size`, as many as `objects` tells how many objects each has."""
    generator = torch.Generator().manual_seed(3)
    labels = []
    for count in objects:
        boxes = 0.2 + 0.3 * torch.rand(count, 4, generator=generator)
        labels.append(
            {"class_labels": torch.randint(0, classes, (count,), generator=generator), "boxes": boxes}
        )
    return Batch(
        pixel_values=torch.rand(len(objects), 3, *size, generator=generator),
        pixel_mask=torch.ones(len(objects), *size, dtype=torch.int64),
        labels=labels,
        image_ids=list(range(len(objects))),
        sizes=torch.tensor([size] * len(objects)),
    )
