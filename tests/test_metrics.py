"""Average precision against pycocotools on the file itself, a port of VOC's own code, and cases by hand."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from qdetr_cli import plugins
from qdetr_cli.data import DetectionData, Record, open_data
from qdetr_cli.errors import DivergedError, PluginError
from qdetr_cli.metrics import Detections, coco_metrics, measure, voc_average_precision

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
         "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large")  # fmt: skip


def record(image_id, boxes, labels=None, difficult=None, crowd=None):
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(corners)
    return Record(
        image=Path(f"{image_id}.jpg"),
        image_id=image_id,
        key=str(image_id),
        width=200,
        height=200,
        boxes=corners,
        labels=np.array(labels or [0] * count, dtype=np.int64),
        difficult=np.array(difficult or [False] * count, dtype=np.bool_),
        crowd=np.array(crowd or [False] * count, dtype=np.bool_),
        area=(corners[:, 2:] - corners[:, :2]).prod(axis=1),
    )


def data_of(*records, names=("cat",), kind="voc"):
    return DetectionData(
        kind=kind, root=Path(), split="val", class_names=names, category_ids=tuple(range(1, len(names) + 1)),
        records=records,
    )  # fmt: skip


def found(image_id, boxes, scores, labels=None):
    return Detections(
        image_id=image_id,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        scores=np.array(scores, dtype=np.float64),
        labels=np.array(labels or [0] * len(scores), dtype=np.int64),
    )


def random_case(seed, kind="voc", images=12, classes=3):
    """Whole-pixel boxes, difficult ones among them, and shaken copies, doubles and strays as detections."""
    rng = np.random.default_rng(seed)
    records, detections = [], []
    for image_id in range(1, images + 1):
        count = int(rng.integers(0, 6))
        low = rng.integers(0, 100, (count, 2))
        boxes = np.concatenate([low, low + rng.integers(4, 99, (count, 2))], axis=1).astype(np.float64)
        labels = rng.integers(0, classes - 1, count)  # the last class has no object
        records.append(record(image_id, boxes, labels.tolist(), (rng.random(count) < 0.25).tolist()))
        strays = np.concatenate([np.zeros((4, 2)), rng.integers(10, 199, (4, 2))], axis=1)
        shaken = np.concatenate([boxes, boxes, strays]) + rng.integers(-6, 7, (2 * count + 4, 4))
        shaken[:, 2:] = np.maximum(shaken[:, 2:], shaken[:, :2] + 2)
        guesses = np.concatenate([labels, labels, rng.integers(0, classes, 4)])
        detections.append(
            found(image_id, shaken, rng.permutation(len(shaken)) / 50 + image_id / 1e4, guesses.tolist())
        )
    return data_of(*records, names=("cat", "dog", "emu")[:classes], kind=kind), detections


# Pascal VOC


def by_hand():
    """Two images, three counted objects and a difficult one; see the table in the test."""
    data = data_of(
        record(1, [(0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)], difficult=[False, False, True]),
        record(2, [(0, 0, 10, 10)]),
    )
    detections = [
        found(
            1,
            [(0, 0, 10, 10), (0, 0, 10, 9), (50, 50, 60, 60), (50, 50, 60, 60), (20, 0, 30, 10)],
            [0.9, 0.8, 0.7, 0.65, 0.5],
        ),
        found(2, [(0, 0, 10, 5), (100, 100, 110, 110)], [0.6, 0.4]),
    ]
    return data, detections


def test_voc_by_hand():
    """Ranked: .9 right, .8 a second hit (wrong), .7 and .65 difficult (ignored), .6 at IoU 0.5 (wrong), .5
    right, .4 wrong. Three objects: recalls 1/3 1/3 1/3 2/3 2/3, precisions 1 1/2 1/3 1/2 2/5."""
    data, detections = by_hand()
    assert voc_average_precision(data, detections)["cat"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 1 / 2)
    eleven = voc_average_precision(data, detections, eleven_point=True)["cat"]
    assert eleven == pytest.approx((4 * 1 + 3 * 1 / 2) / 11)  # recalls 0 to 0.3, then 0.4 to 0.6
    looser = voc_average_precision(data, detections, iou=0.49)[
        "cat"
    ]  # .6 is right now: precisions 1, 2/3, 3/4
    assert looser == pytest.approx(1 / 3 * 1 + 2 / 3 * 3 / 4)


def devkit(data, detections, name, *, iou=0.5, eleven_point=False):
    """VOC's evaluation as its devkit states it: pixels from 1, widths with + 1, one by one."""
    label = data.class_names.index(name)
    ranked = sorted(
        ((float(s), d.image_id, b) for d in detections
         for s, b, c in zip(d.scores, d.boxes, d.labels, strict=True) if c == label),
        key=lambda entry: -entry[0],
    )  # fmt: skip
    truth = {}
    for r in data.records:
        objects = zip(r.boxes, r.difficult.tolist(), r.labels, strict=True)
        truth[r.image_id] = [(box, hard) for box, hard, c in objects if c == label]
    count = sum(not hard for boxes in truth.values() for _, hard in boxes)
    used, right, wrong, recalls, precisions = set(), 0, 0, [], []
    for _, image_id, (left, top, right_side, bottom) in ranked:
        a = (left + 1, top + 1, right_side, bottom)
        best, chosen = -np.inf, None
        for t, ((x1, y1, x2, y2), _) in enumerate(truth[image_id]):
            b = (x1 + 1, y1 + 1, x2, y2)
            width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
            if width > 0 and height > 0:
                areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
                overlap = width * height / (sum(areas) - width * height)
                if overlap > best:
                    best, chosen = overlap, t
        if best > iou:
            if truth[image_id][chosen][1]:
                continue
            if (image_id, chosen) in used:
                wrong += 1
            else:
                right += 1
                used.add((image_id, chosen))
        else:
            wrong += 1
        recalls.append(right / count)
        precisions.append(right / (right + wrong))
    if eleven_point:
        tops = [
            max((p for p, r in zip(precisions, recalls, strict=True) if r >= k / 10), default=0)
            for k in range(11)
        ]
        return sum(tops) / 11
    area, last = 0.0, 0.0
    for i, recall in enumerate(recalls):
        area += (recall - last) * max(precisions[i:])
        last = recall
    return area


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("eleven_point", [False, True], ids=["area", "11 points"])
@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_voc_as_the_devkit(seed, eleven_point, iou):
    data, detections = random_case(seed)
    ours = voc_average_precision(data, detections, iou=iou, eleven_point=eleven_point)
    for name in ("cat", "dog"):
        assert ours[name] == pytest.approx(devkit(data, detections, name, iou=iou, eleven_point=eleven_point))
    assert ours["emu"] == -1


def test_eleven_points_at_exact_recalls():
    """With ten objects recall meets each point exactly; 3 * 0.1 is not 0.3 in floating point."""
    boxes = [(20 * i, 0, 20 * i + 9, 9) for i in range(10)]
    detections = [found(1, boxes[:3], [0.9, 0.8, 0.7])]
    ap = voc_average_precision(data_of(record(1, boxes)), detections, eleven_point=True)["cat"]
    assert ap == pytest.approx(4 / 11)


def test_a_difficult_object_and_a_crowd_change_nothing():
    boxes = [(0, 0, 10, 10), (50, 50, 90, 90)]
    detections = [found(1, [*boxes, (52, 52, 90, 90)], [0.5, 0.9, 0.8])]
    for marks in ({"difficult": [False, True]}, {"crowd": [False, True]}):
        assert voc_average_precision(data_of(record(1, boxes, **marks)), detections)["cat"] == 1
    metrics = measure(data_of(record(1, boxes, difficult=[False, True])), detections)
    assert metrics.ap50 == pytest.approx(
        0.5, abs=0.01
    )  # COCO lets one detection have the ignored object, not two


# COCO


def reference(truth, results):
    """pycocotools as its users call it: two files in, twelve numbers out, and the precision array."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.fixture
def coco_root(tmp_path):
    """A COCO root with crowds, segment areas, a `difficult` key, ids with holes and boxes of all sizes."""
    rng = np.random.default_rng(0)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    images, annotations = [], []
    for image_id in (4, 9, 2, 30, 7, 11):
        Image.new("RGB", (300, 300)).save(tmp_path / "val" / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 300, "height": 300})
        for _ in range(int(rng.integers(0, 9))):
            left, top = rng.uniform(0, 100, 2)
            width, height = rng.uniform(5, 20, 2) * rng.choice([1, 3, 9])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice([3, 90])),
                    "bbox": [left, top, width, height],
                    "area": width * height * 0.7,
                    "iscrowd": int(rng.random() < 0.2),
                    "difficult": int(rng.random() < 0.3),
                }
            )
    categories = [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 50, "name": "emu"}]
    (tmp_path / "annotations" / "instances_val.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return tmp_path


def shaken(data, seed=1, strays=110):
    """Detections near the objects and more strays than COCO's 100 for an image."""
    rng = np.random.default_rng(seed)
    detections = []
    for one in data.records:
        near = one.boxes + rng.normal(0, 3, one.boxes.shape)
        low = rng.uniform(0, 200, (strays, 2))
        boxes = np.concatenate([near, np.concatenate([low, low + rng.uniform(5, 90, (strays, 2))], axis=1)])
        scores = np.concatenate([rng.uniform(0.3, 1, len(near)), rng.uniform(0, 0.6, strays)])
        labels = np.concatenate([one.labels, rng.integers(0, len(data.class_names), strays)])
        detections.append(found(one.image_id, boxes, scores, labels.tolist()))
    return detections


@pytest.fixture(params=["pycocotools", "faster-coco-eval"])
def counted_by(request, monkeypatch):
    """Which library counts; what is installed decides."""
    if request.param == "pycocotools":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_coco_as_pycocotools_on_the_file(coco_root, counted_by):
    data = open_data(coco_root)
    assert data.records[0].difficult.any() or data.records[1].difficult.any()
    detections = shaken(data)
    results = [
        {"image_id": d.image_id, "category_id": data.category_ids[c], "score": float(s),
         "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
        for d in detections for b, s, c in zip(d.boxes, d.scores, d.labels, strict=True)
    ]  # fmt: skip
    expected = reference(coco_root / "annotations" / "instances_val.json", results)
    metrics = measure(data, detections)
    assert 0 < metrics.ap < 1
    assert [getattr(metrics, name) for name in NAMES] == pytest.approx(list(expected.stats), abs=1e-12)
    precision = expected.eval["precision"][:, :, :, 0, 2]
    for c, name in enumerate(("cat", "emu", "dog")):
        theirs = precision[:, :, c]
        assert metrics.per_class[name]["ap"] == pytest.approx(
            theirs[theirs > -1].mean() if name != "emu" else -1
        )
        assert metrics.per_class[name]["ap50"] == pytest.approx(theirs[0].mean())
    objects = {name: numbers["objects"] for name, numbers in metrics.per_class.items()}
    assert objects["emu"] == 0
    assert sum(objects.values()) == sum((~one.crowd).sum() for one in data.records)


def test_perfect_detections_score_one():
    data, _ = random_case(0)
    exact = [found(r.image_id, r.boxes, np.full(len(r.boxes), 0.9), r.labels.tolist()) for r in data.records]
    metrics = measure(data, exact)
    assert metrics.ap == pytest.approx(1)
    assert metrics.ap50_voc_area == 1
    assert metrics.ap50_voc07 == 1


def test_both_libraries_give_the_same_numbers(coco_root, monkeypatch):
    data = open_data(coco_root)
    with monkeypatch.context() as without:
        without.setattr("qdetr_cli.metrics.coco._Evaluation", None)  # pycocotools is not asked
        fast = coco_metrics(data, shaken(data))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    slow = coco_metrics(data, shaken(data))
    assert fast.numbers == pytest.approx(slow.numbers, rel=0, abs=1e-12)
    np.testing.assert_allclose(fast.ap, slow.ap, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fast.ap50, slow.ap50, rtol=0, atol=1e-12)


def test_difficult_objects_of_voc_are_ignored_by_coco_too():
    data, detections = random_case(3)
    numbers = coco_metrics(data, detections).numbers
    counted = coco_metrics(data_of(*data.records, names=data.class_names, kind="coco"), detections).numbers
    assert numbers["ap"] != counted["ap"]
    only = data_of(record(1, [(0, 0, 9, 9)], difficult=[True]))
    assert coco_metrics(only, [found(1, [(0, 0, 9, 9)], [0.9])]).numbers["ap"] == -1


# All together


def test_nothing_reaches_stdout(capsys):
    measure(*random_case(0))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("records", "detections"),
    [
        ([record(1, [(0, 0, 9, 9)])], []),
        ([record(1, [])], []),
        ([record(1, [])], [found(1, [(0, 0, 9, 9)], [0.5])]),
        ([record(1, [(0, 0, 9, 9)])], [found(1, [], [])]),
        ([record(1, [(0, 0, 9, 9)])], [found(1, [(5, 5, 5, 5)], [0.5])]),
    ],
    ids=["nothing found", "nothing there", "only strays", "an empty entry", "a box without area"],
)
def test_edges_are_json_without_nan(records, detections):
    metrics = measure(data_of(*records), detections)
    result = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    objects = len(records[0].labels)
    assert result["ap50_voc_area"] == (0 if objects else None)
    assert result["ap"] == (0 if objects else None)
    assert result["ap_large"] is None
    assert result["per_class"]["cat"]["objects"] == objects


def test_to_dict_has_the_promised_keys():
    result = measure(*random_case(0)).to_dict()
    assert {*NAMES, "ap50_voc_area", "ap50_voc07", "per_class", "plugins"} == set(result)
    assert set(result["per_class"]["cat"]) == {"ap", "ap50", "ap50_voc_area", "ap50_voc07", "objects"}
    assert result["per_class"]["emu"]["ap50_voc07"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_detection_that_is_not_finite(value):
    data = data_of(record(1, [(0, 0, 9, 9)]))
    with pytest.raises(DivergedError, match="image 1: the model found boxes or scores that are not finite"):
        measure(data, [found(1, [(0, 0, value, 9)], [0.5])])
    with pytest.raises(DivergedError):
        measure(data, [found(1, [(0, 0, 9, 9)], [value])])


def test_metric_plugins(monkeypatch):
    monkeypatch.setattr(plugins, "_TABLE", dict(plugins._TABLE))  # what is registered here goes with the test

    @plugins.register("metric", "count_for_this_test")
    def count(data, detections):
        return {
            "images": float(len(data.records)),
            "detections": float(sum(len(d.scores) for d in detections)),
        }

    data = data_of(record(1, [(0, 0, 9, 9)]))
    metrics = measure(data, [found(1, [(0, 0, 9, 9)], [0.5])], metrics=["count_for_this_test"])
    assert metrics.to_dict()["plugins"] == {"count_for_this_test": {"images": 1.0, "detections": 1.0}}
    with pytest.raises(PluginError):
        measure(data, [], metrics=["no_such_metric"])
