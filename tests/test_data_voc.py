"""Reading VOC: what a clean root gives, and one clear message for each way it can be broken."""

import re

import numpy as np
import pytest
from PIL import Image

from qdetr_cli.data import check_images, open_data
from qdetr_cli.errors import DataError

BOMB = (
    '<!DOCTYPE bomb [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
    '<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]><annotation><object><name>&c;</name></object></annotation>'
)
OUTSIDE = '<!DOCTYPE a [<!ENTITY file SYSTEM "file:///etc/hostname">]><annotation>&file;</annotation>'


def thing(name="cat", box=(1, 1, 10, 10), extra=""):
    corners = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def xml(*objects, size="<size><width>40</width><height>30</height></size>", filename=""):
    return f"<annotation><filename>{filename}</filename>{size}{''.join(objects)}</annotation>"


@pytest.fixture
def root(tmp_path):
    """Two images: `a` (train and val) and `b` (val)."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
    (tmp_path / "Annotations" / "a.xml").write_text(
        xml(thing("dog", (1, 2, 10, 20)), thing("cat", (5, 5, 9, 9), "<difficult>1</difficult>"))
    )
    (tmp_path / "Annotations" / "b.xml").write_text(xml())
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("a\nb\n")
    return tmp_path


def write(root, text, name="a"):
    (root / "Annotations" / f"{name}.xml").write_bytes(text if isinstance(text, bytes) else text.encode())


def lines(root, text, split="val"):
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text(text)


def test_clean_root(root):
    data = open_data(root)
    assert (data.kind, data.split, data.class_names, data.category_ids) == (
        "voc",
        "val",
        ("cat", "dog"),
        (1, 2),
    )
    assert data.warnings == {}
    first, second = data.records
    assert (first.key, first.image_id, first.width, first.height) == ("a", 1, 40, 30)
    assert first.image == root / "JPEGImages" / "a.jpg"
    np.testing.assert_array_equal(
        first.boxes, [[0, 1, 10, 20], [4, 4, 9, 9]]
    )  # counted from 0, last included
    np.testing.assert_array_equal(first.labels, [1, 0])
    np.testing.assert_array_equal(first.difficult, [False, True])
    np.testing.assert_array_equal(first.area, [190, 25])
    assert second.boxes.shape == (0, 4)
    assert data.take([1]).records == (second,)


def test_every_split_has_the_classes_of_the_whole_root(root):
    write(root, xml(thing("zebra")), "b")
    assert open_data(root, split="train").class_names == ("cat", "dog", "zebra")


def test_classes_may_be_fixed(root):
    data = open_data(root, classes=["dog", "bird", "cat"])
    assert data.class_names == ("dog", "bird", "cat")
    np.testing.assert_array_equal(data.records[0].labels, [0, 2])


@pytest.mark.parametrize("line", ["a  1", "a -1", "a.jpg", " a ", "\ufeffa"], ids=repr)
def test_lines_of_a_split(root, line):
    (root / "ImageSets" / "Main" / "val.txt").write_text(line + "\n\n", encoding="utf-8")
    assert [record.key for record in open_data(root).records] == ["a"]


def test_names_with_spaces_and_dots(root):
    (root / "JPEGImages" / "a.jpg").rename(root / "JPEGImages" / "my photo.v2.JPEG")
    (root / "Annotations" / "a.xml").rename(root / "Annotations" / "my photo.v2.xml")
    lines(root, "my photo.v2\n")
    assert open_data(root).records[0].image.name == "my photo.v2.JPEG"


def test_filename_is_used_where_the_key_finds_no_image(root):
    (root / "JPEGImages" / "a.jpg").rename(root / "JPEGImages" / "other.jpg")
    write(root, xml(thing(), filename="other.jpg"))
    assert open_data(root).records[0].image.name == "other.jpg"


def test_an_absolute_filename_does_no_harm(root):
    write(root, xml(thing(), filename="C:\\photos\\a.jpg"))
    assert open_data(root).records[0].image.name == "a.jpg"


def test_parts_of_an_object_are_not_objects(root):
    part = thing("head", (1, 1, 2, 2)).replace("object>", "part>")
    write(root, xml(thing("cat", (3, 3, 9, 9), part)))
    data = open_data(root)
    assert data.class_names == ("cat",)
    np.testing.assert_array_equal(data.records[0].boxes, [[2, 2, 9, 9]])


def test_repairs_are_counted(root):
    boxes = [(-9, 1, 10, 10), (1, 1, 10, 10), (50, 5, 60, 9), (9, 9, 3, 3)]
    write(root, xml(*(thing(box=box) for box in boxes), size=""))
    data = open_data(root)
    np.testing.assert_array_equal(data.records[0].boxes, [[0, 0, 10, 10], [0, 0, 10, 10]])
    assert data.warnings == {
        "boxes clipped to the image": 1,
        "boxes dropped: no area inside the image": 2,
        "images without a size in the annotation: read from the file": 1,
    }
    assert (data.records[0].width, data.records[0].height) == (40, 30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "a.xml: not well-formed XML"),
        ("", "a.xml: not well-formed XML"),
        (b"\xff\xfe\x00", "a.xml: not well-formed XML"),
        (BOMB, "a.xml: a document type"),
        (BOMB.encode("utf-16"), "a.xml: a document type"),
        (OUTSIDE, "a.xml: a document type"),
        ("<html/>", "outermost element is <html>"),
        (xml("<object><name>cat</name></object>"), "object 1 (cat) has no <bndbox>"),
        (xml(thing(" ")), "object 1 has no <name>"),
        (xml(thing(), thing(box=(1, 2, "x", 4))), "object 2 (cat), bndbox: <xmax> is 'x', not a number"),
        (xml(thing(box=(1, "nan", 3, 4))), "<ymin> is 'nan', not a number"),
        (xml(thing(box=(1, 1, "inf", 4))), "<xmax> is 'inf', not a number"),
        (xml(thing(box=("", 1, 3, 4))), "bndbox has no <xmin>"),
        (xml(thing(extra="<difficult>maybe</difficult>")), "difficult is 'maybe', not 0 or 1"),
        (xml(size="<size><width>4.5</width><height>3</height></size>"), "not in whole pixels"),
        (xml(size="<size><width>wide</width><height>3</height></size>"), "<width> is 'wide', not a number"),
        (xml(thing(), filename="../../etc/passwd"), "a.xml: file name '../../etc/passwd' leaves its folder"),
        (xml(thing(), filename="..\\secret.jpg"), "leaves its folder"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 else "",
)
def test_broken_annotations(root, text, message):
    write(root, text)
    with pytest.raises(DataError, match=re.escape(message)):
        open_data(root)


def test_a_broken_annotation_of_another_split_is_named(root):
    write(root, "<annotation>", "b")
    with pytest.raises(DataError, match=r"b\.xml: not well-formed"):
        open_data(root, split="train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "the split lists no image"),
        ("a\nb\na\n", "images are listed twice:\n  a\n"),
        ("a\nc\n", "annotations that val.txt lists are missing:\n  c.xml"),
        ("../a\n", "file name '../a.xml' leaves its folder"),
        ("/etc/passwd\n", "leaves its folder"),
    ],
    ids=["empty", "twice", "no annotation", "traversal", "absolute"],
)
def test_broken_splits(root, text, message):
    lines(root, text)
    with pytest.raises(DataError, match=re.escape(message)):
        open_data(root)


def test_a_split_that_is_no_text(root):
    (root / "ImageSets" / "Main" / "val.txt").write_bytes(b"\xff\xfe\x01")
    with pytest.raises(DataError, match="cannot be read as a list"):
        open_data(root)


@pytest.mark.parametrize("split", ["test", "../val"])
def test_unknown_split(root, split):
    lines(root, "a 1\n", "cat_val")
    with pytest.raises(DataError) as raised:
        open_data(root, split=split)
    if split == "test":
        assert "Splits found: train, val. Name one with --split." in str(raised.value)


def test_missing_images_are_listed_and_counted(root):
    names = [f"n{i:02d}" for i in range(14)]
    for name in names:
        write(root, xml(), name)
    lines(root, "\n".join(["a", *names]))
    with pytest.raises(DataError) as raised:
        open_data(root)
    message = str(raised.value)
    assert "n00 (.jpg, .png, ...)" in message
    assert "n09" in message
    assert "n10" not in message
    assert "... and 4 more" in message
    assert "--images" in message


def test_another_image_folder(root, tmp_path):
    other = tmp_path / "elsewhere"
    (root / "JPEGImages").rename(other)
    assert open_data(root, images=other).records[0].image == other / "a.jpg"
    with pytest.raises(DataError, match=r"no such image folder. Correct --images"):
        open_data(root, images=tmp_path / "nowhere")


def test_unknown_class_suggests_the_near_one(root):
    with pytest.raises(DataError) as raised:
        open_data(root, classes=["Cat", "dog"])
    assert "'cat' in a.xml, did you mean 'Cat'?" in str(raised.value)
    assert "Known classes: Cat, dog" in str(raised.value)


def test_classes_of_one_name(root):
    with pytest.raises(DataError, match="classes have the same name"):
        open_data(root, classes=["cat", "dog", "cat"])


def test_a_root_without_objects(root):
    write(root, xml())
    with pytest.raises(DataError, match="no annotation has an <object>"):
        open_data(root)


def test_the_devkit_folder_points_at_the_root(root, tmp_path):
    inner = tmp_path / "devkit" / "VOC2007"
    inner.mkdir(parents=True)
    for folder in ("Annotations", "JPEGImages", "ImageSets"):
        (root / folder).rename(inner / folder)
    with pytest.raises(DataError, match=r"Did you mean .*VOC2007\?"):
        open_data(tmp_path / "devkit")


def test_check_images_lists_every_broken_file(root):
    check_images(open_data(root))
    (root / "JPEGImages" / "a.jpg").write_bytes(b"")
    Image.new("RGB", (41, 30)).save(root / "JPEGImages" / "b.jpg")
    with pytest.raises(DataError) as raised:
        check_images(open_data(root))
    assert "a.jpg: cannot be read as an image" in str(raised.value)
    assert "b.jpg: the image is 41x30 but its annotation says 40x30" in str(raised.value)
