"""Reading COCO: what a clean root gives, and one clear message for each way it can be broken."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from qdetr_cli.data import open_data
from qdetr_cli.errors import DataError


def content():
    """Two images of 40x30; categories out of order with holes, as COCO has them."""
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 3, "file_name": "sub/b.jpg", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 150.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0.5, 0.25, 3, 4], "iscrowd": 1},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
    }


def write(root, data, name="instances_val2017.json"):
    (root / "annotations" / name).write_text(data if isinstance(data, str) else json.dumps(data))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017" / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "val2017" / "a.jpg")
    Image.new("RGB", (40, 30)).save(tmp_path / "val2017" / "sub" / "b.jpg")
    write(tmp_path, content())
    return tmp_path


def test_clean_root(root):
    data = open_data(root)
    assert (data.kind, data.root, data.class_names, data.category_ids) == (
        "coco",
        root,
        ("cat", "dog"),
        (5, 90),
    )
    assert data.warnings == {}
    first, second = data.records
    assert (first.image_id, first.key, first.width, first.height) == (7, "a.jpg", 40, 30)
    np.testing.assert_array_equal(first.boxes, [[1, 2, 11, 22], [0.5, 0.25, 3.5, 4.25]])
    np.testing.assert_array_equal(first.labels, [1, 0])
    np.testing.assert_array_equal(first.crowd, [False, True])
    np.testing.assert_array_equal(first.area, [150.5, 12])
    assert second.image == root / "val2017" / "sub" / "b.jpg"
    assert second.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "folder", ["val2017", "images/val2017", "val", "images/val", "images", "val2017/images", "."], ids=str
)
def test_image_folders(root, folder):
    (root / "val2017").rename(root / "moved")
    target = root / folder
    if folder == ".":
        for entry in (root / "moved").iterdir():
            entry.rename(root / entry.name)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        (root / "moved").rename(target)
    assert open_data(root).records[0].image == target / "a.jpg"


def test_a_lone_json(root, tmp_path):
    file = root / "annotations" / "instances_val2017.json"
    assert open_data(file).records[0].image == root / "val2017" / "a.jpg"
    lone = tmp_path / "far" / "labels.json"
    lone.parent.mkdir()
    file.rename(lone)
    data = open_data(lone, images=root / "val2017")
    assert (data.split, data.root) == ("labels", lone.parent)
    (root / "val2017").rename(root / "hidden")
    with pytest.raises(DataError, match=r"(?s)images are missing in .*--images"):
        open_data(lone)


def test_classes_may_be_fixed(root):
    data = open_data(root, classes=["dog", "bird", "cat"])
    assert data.class_names == ("dog", "bird", "cat")
    assert data.category_ids == (90, 92, 5)  # `bird` gets an id that is free
    np.testing.assert_array_equal(data.records[0].labels, [0, 2])


def test_a_category_without_objects_may_be_unknown(root):
    changed = content()
    changed["categories"].append({"id": 0, "name": "animals"})  # as some labelling services write
    write(root, changed)
    data = open_data(root, classes=["cat", "dog"])
    assert data.class_names == ("cat", "dog")
    assert sum(data.warnings.values()) == 1
    with pytest.raises(DataError, match=r"'cat', did you mean 'cats'\?"):
        open_data(root, classes=["cats", "dog"])


def test_repairs_are_counted(root):
    changed = content()
    boxes = [[-5, 0, 10, 10], [39.7, 0, 0.6, 5], [50, 0, 5, 5], [1, 1, 0, 5], [9, 9, -3, 4]]
    changed["annotations"] = [
        {"id": i, "image_id": 7, "category_id": 5, "bbox": b} for i, b in enumerate(boxes)
    ]
    del changed["images"][1]["width"]
    write(root, changed)
    data = open_data(root)
    # the second sticks out by a rounding error: kept as annotated, so that COCO's AP is exact
    np.testing.assert_allclose(data.records[0].boxes, [[0, 0, 5, 10], [39.7, 0, 40.3, 5]])
    assert data.warnings == {
        "boxes clipped to the image": 1,
        "boxes dropped: no area inside the image": 3,
        "images without a size in the annotation: read from the file": 1,
    }
    assert data.records[1].width == 40


def change(where, key, value):
    """A file with one value changed, or taken out when it is None."""
    data = content()
    entry = data if where is None else data[where][0]
    if value is None:
        del entry[key]
    else:
        entry[key] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "instances_val2017.json: cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "holds a list, as a file of detections does"),
        ("3", "holds no object with images"),
        (change(None, "annotations", None), "'annotations' is missing"),
        (change(None, "images", {"a": 1}), "'images' is not a list of objects"),
        (change(None, "images", [1]), "'images' is not a list of objects"),
        (change(None, "images", []), "the split has no image"),
        (change(None, "categories", []), "there is none"),
        (change("images", "id", "7"), "images[0]: id '7' is not a whole number"),
        (change("images", "id", True), "images[0]: id True is not a whole number"),
        (change("images", "id", 3), "images have the same id:\n  3"),
        (change("images", "file_name", None), "images[0]: file_name None is not a name"),
        (change("images", "file_name", "sub/b.jpg"), "images have the same file_name"),
        (change("images", "file_name", "../../etc/passwd"), "image 7: file name '../../etc/passwd' leaves"),
        (change("images", "file_name", "/etc/passwd"), "leaves its folder"),
        (change("images", "file_name", "C:\\a.jpg"), "leaves its folder"),
        (change("images", "file_name", "c.jpg"), "images are missing"),
        (change("categories", "id", 5), "categories have the same id:\n  5"),
        (change("categories", "name", "cat"), "categories have the same name:\n  cat"),
        (change("categories", "name", " "), "categories[0]: id 90"),
        (change("annotations", "image_id", 8), "annotation 1: image_id 8 is not the id of an image"),
        (change("annotations", "image_id", [7]), "image_id [7] is not the id of an image"),
        (change("annotations", "category_id", 1), "annotation 1: category_id 1 is not one of 5, 90"),
        (change("annotations", "category_id", {}), "category_id {} is not one of"),
        (change("annotations", "bbox", None), "bbox None is not [left, top, width, height]"),
        (change("annotations", "bbox", [1, 2, 3]), "bbox [1, 2, 3] is not"),
        (change("annotations", "bbox", [1, 2, float("nan"), 4]), "bbox [1, 2, nan, 4] is not"),
        (change("annotations", "bbox", [1, 2, 10**400, 4]), "is not [left, top, width, height] in finite"),
        (change("annotations", "bbox", ["1", 2, 3, 4]), "bbox ['1', 2, 3, 4] is not"),
        (change("annotations", "area", -1), "area -1 is not a number of pixels"),
        (change("annotations", "iscrowd", "no"), "iscrowd 'no' is not 0 or 1"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_broken_files(root, data, message):
    write(root, data)
    with pytest.raises(DataError, match=re.escape(message)):
        open_data(root)


def test_a_broken_category_id_with_fixed_classes(root):
    write(root, change("annotations", "category_id", {}))
    with pytest.raises(DataError, match="annotation 1: category_id"):
        open_data(root, classes=["dog", "cat"])


def test_all_faults_of_a_kind_at_once(root):
    data = content()
    data["annotations"] = [
        {"id": i, "image_id": i, "category_id": 5, "bbox": [1, 2, 3, 4]} for i in range(20)
    ]
    write(root, data)
    with pytest.raises(DataError, match=r"(?s)annotation 0: .*annotation 2: .* and 8 more"):
        open_data(root)


def test_windows_paths(root):
    changed = content()
    changed["images"][1]["file_name"] = "sub\\b.jpg"
    write(root, changed)
    assert open_data(root).records[1].image == root / "val2017" / "sub" / "b.jpg"


def test_splits_are_found_by_their_beginning(root):
    write(root, content(), "instances_val2014.json")
    with pytest.raises(DataError, match=r"more than one split begins so. Splits found: val2014, val2017"):
        open_data(root)
    assert open_data(root, split="val2017").split == "val2017"
    with pytest.raises(DataError, match=r"no such split. Splits found: val2014, val2017"):
        open_data(root, split="test")
    write(root, content(), "instances_val.json")
    assert open_data(root).records[0].image == root / "val2017" / "a.jpg"


def test_a_file_without_instances(root):
    (root / "annotations" / "instances_val2017.json").rename(root / "annotations" / "captions_val2017.json")
    with pytest.raises(DataError, match=r"none among captions_val2017\.json"):
        open_data(root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "there is no such folder or file"),
        ("a.txt", "is a file, but no .json"),
        ("empty", "is neither"),
    ],
)
def test_what_is_no_data_set(tmp_path, name, message):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / name)


def test_a_root_with_both_forms_asks_which(root):
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / "a.xml").write_text("<annotation/>")
    with pytest.raises(DataError, match="Name the json"):
        open_data(root)
