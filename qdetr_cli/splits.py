"""The splits of data that a command reads, opened, checked and said."""

from pathlib import Path

from qdetr_cli.data import DetectionData, check_images, open_data
from qdetr_cli.results import DataSource, Listener


def open_split(data: DataSource, split: str, listener: Listener) -> DetectionData:
    """A split that is ready to be read. A split that ends in .json is a COCO file of its own."""
    path = Path(split) if split.endswith(".json") else data.path
    opened = open_data(path, split=split, images=data.images)
    check_images(opened)
    listener.say(
        f"{path}: {opened.kind.upper()}, split {opened.split}, {len(opened.records)} images, "
        f"{len(opened.class_names)} classes"
    )
    for what, count in opened.warnings.items():
        listener.say(f"warning: {opened.split}: {what}: {count}")
    return opened


def measured_on(data: DataSource, training: DetectionData, listener: Listener) -> DetectionData:
    """The split to measure on; images that are trained on too are said, for the AP is then too high."""
    evaluation = open_split(data, data.split, listener)
    seen = {record.image.resolve() for record in training.records}
    shared = sum(record.image.resolve() in seen for record in evaluation.records)
    if shared:
        listener.say(
            f"warning: {shared} of {len(evaluation.records)} images to measure on are in the training split "
            "too: the AP says little about new images; name another --split"
        )
    return evaluation
