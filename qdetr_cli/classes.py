"""Which class of the model is which class of the data set."""

from collections.abc import Sequence

from qdetr_cli.checkpoint import Detector
from qdetr_cli.data import DetectionData

# VOC's spelling of classes that COCO has too
VOC_TO_COCO = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
NUMBERED = ("LABEL_", "class ")  # how classes without names are called


def class_index(detector: Detector, data: DetectionData) -> tuple[int, ...] | None:
    """For each data-set label the model's class index; None when the model does not know the classes.

    Names decide (case apart, VOC's spelling of COCO's classes accepted). A checkpoint that has no names, only
    numbers (LABEL_0 of transformers, "class 0" of an original file), is read by position: the order of
    classes, or COCO's category ids for heads that reach them.
    """
    by_name = {name.lower(): index for index, name in detector.class_names.items()}
    wanted = [_spelling(name, by_name) for name in data.class_names]
    if all(name in by_name for name in wanted):
        return tuple(by_name[name] for name in wanted)
    if all(name.startswith(NUMBERED) for name in detector.class_names.values()):
        return _by_position(max(detector.class_names) + 1, data)
    return None


def missing_classes(detector: Detector, names: Sequence[str]) -> list[str]:
    """The names that the model has no class for."""
    by_name = {name.lower(): index for index, name in detector.class_names.items()}
    return [name for name in names if _spelling(name, by_name) not in by_name]


def _spelling(name: str, known: dict[str, int]) -> str:
    lower = name.lower()
    return lower if lower in known else VOC_TO_COCO.get(lower, lower)


def _by_position(classes: int, data: DetectionData) -> tuple[int, ...] | None:
    if classes == len(data.class_names):
        return tuple(range(classes))
    if data.kind == "coco" and max(data.category_ids) < classes:
        return data.category_ids
    return None
