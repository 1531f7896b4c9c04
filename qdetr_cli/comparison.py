"""A file beside its model: the images to compare on, parity of the outputs, and the AP of both."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn

from qdetr_cli.artefact import Artefact, Canvas, padded
from qdetr_cli.data import Batch, DetectionData, ImageSet, Processor, Sample, collate, prepare_image
from qdetr_cli.errors import ExportError
from qdetr_cli.evaluate import Bench, detect_all
from qdetr_cli.metrics import Metrics, measure
from qdetr_cli.models import Model, known_classes
from qdetr_cli.results import Listener
from qdetr_cli.scenes import scene

if TYPE_CHECKING:  # it needs the extra [export]
    from qdetr_cli.export.parity import Parity

Size = tuple[int, int]

COMPARED = (8, 16)  # fewest and most images on which file and model are compared: few medians say little
PIXELS = 16 * 640 * 640  # of those images together; the fewest may pass it
SAME_AP = 0.005  # AP of file and model may differ by this: rounding moves a code, and that may move a rank


def sample(processor: Processor, data: DetectionData | None, size: Size) -> Batch:
    """The images to compare on: the first of the data, else drawn scenes; of large ones fewer."""
    count = min(max(PIXELS // (size[0] * size[1]), COMPARED[0]), COMPARED[1])
    if data is None:
        return collate([_drawn(index, processor) for index in range(count)])
    images = ImageSet(data, processor, range(len(data.class_names)))
    return collate([images[index] for index in range(min(count, len(images)))])


def compared(model: Model, artefact: Artefact, batch: Batch) -> "Parity":
    """How far the file is from the model on a few images. Raises ExportError where that is too far."""
    from qdetr_cli.export.parity import compare

    size = artefact.session.inputs.size
    whole = replace(
        batch,
        pixel_values=padded(batch.pixel_values, size),
        pixel_mask=padded(batch.pixel_mask, size),
    )
    return compare(model.module.eval(), artefact.detector.model, whole, artefact.path)


def both_metrics(
    model: Model, artefact: Artefact, data: DetectionData, listener: Listener
) -> dict[str, Metrics]:
    """AP of the model, at the file's size, and of the file. Raises ExportError where they differ."""
    size = artefact.session.inputs.size
    measured = {
        "model": _metrics(Canvas(model.module, size).eval(), artefact, data, "the model", listener),
        "file": _metrics(artefact.detector.model, artefact, data, "the file", listener),
    }
    apart = abs(measured["model"].ap - measured["file"].ap)
    if apart > SAME_AP:
        raise ExportError(
            f"the file has AP {100 * measured['file'].ap:.2f} where the model has "
            f"{100 * measured['model'].ap:.2f}: more than rounding can explain ({100 * SAME_AP:.1f}); "
            "nothing was written"
        )
    return measured


def _metrics(
    module: nn.Module, artefact: Artefact, data: DetectionData, what: str, listener: Listener
) -> Metrics:
    detector = artefact.detector
    index = known_classes(Model(detector=detector), data)
    bench = Bench(
        data=data, images=ImageSet(data, detector.processor, index), class_index=index, batch_size=8
    )
    with listener.progress(f"AP of {what}", len(bench.images)) as advance:
        found = detect_all(module, detector.family, bench, device=torch.device("cpu"), advance=advance)
    return measure(data, found)


def _drawn(index: int, processor: Processor) -> Sample:
    """A scene of digits, which ships with qdetr, as a network input without labels."""
    image = Image.fromarray(scene(index, split="val", size=256).image)
    nothing = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    return Sample(
        pixel_values=prepare_image(image, processor),
        labels=nothing,
        image_id=index,
        size=(image.height, image.width),
        pad_to=processor.pad_to,
    )
