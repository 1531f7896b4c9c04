"""Which class of the model is which of the data: by name, by VOC's spelling, by position without names."""

from pathlib import Path

import pytest

from qdetr_cli.checkpoint import Detector
from qdetr_cli.classes import class_index, missing_classes
from qdetr_cli.coco_names import COCO_91
from qdetr_cli.data import DetectionData
from qdetr_cli.families import FAMILIES
from qdetr_cli.processors import Processor


def detector(names) -> Detector:
    return Detector(
        model=None,
        family=FAMILIES["detr"],
        processor=Processor(size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3),
        class_names=dict(enumerate(names)),
        source="test",
    )


def data(names, *, kind="voc", ids=None) -> DetectionData:
    ids = tuple(range(1, len(names) + 1)) if ids is None else ids
    return DetectionData(
        kind=kind,
        root=Path("data"),
        split="val",
        class_names=tuple(names),
        category_ids=ids,
        records=(),
        warnings={},
    )


@pytest.mark.parametrize(
    ("model", "wanted", "index"),
    [
        (["a", "b", "c"], ["a", "b", "c"], (0, 1, 2)),
        (["a", "b", "c"], ["c", "a"], (2, 0)),
        (["Cat", "dog"], ["DOG", "cat"], (1, 0)),
        (["N/A", "person", "N/A", "tv"], ["person", "tvmonitor"], (1, 3)),
        (["a", "b"], ["a", "z"], None),
        (["a", "b"], ["a", "b", "z"], None),
    ],
    ids=["same", "a subset in another order", "case", "VOC's spelling", "another", "one more"],
)
def test_names_decide(model, wanted, index):
    assert class_index(detector(model), data(wanted)) == index


def test_voc_spelling_gives_way_to_the_models_own():
    assert class_index(detector(["couch", "sofa"]), data(["sofa"])) == (1,)


def test_voc_data_on_a_coco_head_of_91_classes():
    names = [COCO_91[index] for index in range(91)]
    found = class_index(detector(names), data(["aeroplane", "person"]))
    assert found is not None
    assert [names[index] for index in found] == ["airplane", "person"]


@pytest.mark.parametrize("prefix", ["LABEL_", "class "], ids=["transformers", "original"])
@pytest.mark.parametrize(
    ("classes", "kind", "ids", "index"),
    [
        (3, "voc", None, (0, 1, 2)),
        (3, "coco", (1, 5, 9), (0, 1, 2)),
        (10, "coco", (1, 5, 9), (1, 5, 9)),
        (9, "coco", (1, 5, 9), None),
        (4, "voc", None, None),
    ],
    ids=["as many", "as many, whatever the ids", "category ids", "ids beyond the head", "another count"],
)
def test_heads_without_names_are_read_by_position(prefix, classes, kind, ids, index):
    numbered = detector([f"{prefix}{number}" for number in range(classes)])
    assert class_index(numbered, data(["x", "y", "z"], kind=kind, ids=ids)) == index


def test_missing_classes_are_named():
    assert missing_classes(detector(["tv", "cat"]), ["tvmonitor", "Cat", "yak"]) == ["yak"]
