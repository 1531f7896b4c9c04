"""The digit scenes: the same bytes each time, splits that share nothing, VOC and COCO that agree."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdetr_cli import scenes
from qdetr_cli.errors import DataError
from qdetr_cli.scene_files import write_scenes
from qdetr_cli.scenes import CLASS_NAMES, PHOTOS, Split, digit_crop, scene

TRAIN, VAL = 60, 20
COUNTS: dict[Split, int] = {"train": TRAIN, "val": VAL}
SPLITS: tuple[Split, ...] = ("train", "val")
by_split = pytest.mark.parametrize("split", SPLITS)

Objects = list[tuple[str, int, tuple[int, int, int, int]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(out, train=TRAIN, val=VAL)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def voc_objects(root: Path, stem: str) -> Objects:
    """(name, difficult, half-open pixel box) of each object of one VOC annotation."""
    tree = ET.parse(root / "voc" / "Annotations" / f"{stem}.xml")
    found: Objects = []
    for thing in tree.iterfind("object"):
        left, top, right, bottom = (
            int(thing.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")
        )
        name, difficult = thing.findtext("name", ""), int(thing.findtext("difficult", ""))
        found.append((name, difficult, (left - 1, top - 1, right, bottom)))
    return found


def coco_objects(root: Path, split: Split) -> dict[str, Objects]:
    """The same as `voc_objects`, from the COCO file, for each image stem."""
    coco = json.loads((root / "coco" / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    stems = {image["id"]: Path(image["file_name"]).stem for image in coco["images"]}
    found: dict[str, Objects] = {stem: [] for stem in stems.values()}
    for item in coco["annotations"]:
        left, top, width, height = item["bbox"]
        assert item["area"] == width * height
        assert item["iscrowd"] == 0
        box = (left, top, left + width, top + height)
        found[stems[item["image_id"]]].append((names[item["category_id"]], item["difficult"], box))
    return found


def test_the_same_call_writes_the_same_bytes(root: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "again", train=TRAIN, val=VAL)
    assert contents(tmp_path / "again") == contents(root)


def test_an_image_does_not_depend_on_the_count(root: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "few", train=2, val=1)
    for name in ("voc/JPEGImages/train_000001.png", "voc/Annotations/val_000000.xml"):
        assert (tmp_path / "few" / name).read_bytes() == (root / name).read_bytes()


def test_another_seed_gives_other_images() -> None:
    assert not np.array_equal(scene(0, split="val").image, scene(0, split="val", seed=1).image)


def test_splits_share_no_photograph_and_no_digit() -> None:
    assert not set(PHOTOS["train"]) & set(PHOTOS["val"])
    shipped = {path.stem for path in (scenes.ASSETS / "photos").glob("*.jpg")}
    assert shipped == {*PHOTOS["train"], *PHOTOS["val"]}
    train, val = ({digit.tobytes() for digit in scenes._digits(split)[0]} for split in SPLITS)
    assert len(train) == 4000
    assert len(val) == 1000
    assert not train & val


@by_split
def test_each_split_has_all_classes_equally(split: Split) -> None:
    assert len(set(np.bincount(scenes._digits(split)[1]))) == 1


@by_split
def test_voc_and_coco_agree(root: Path, split: Split) -> None:
    stems = (root / "voc" / "ImageSets" / "Main" / f"{split}.txt").read_text(encoding="utf-8").split()
    coco = coco_objects(root, split)
    assert len(stems) == COUNTS[split]
    assert list(coco) == stems
    for stem in stems:
        assert coco[stem] == voc_objects(root, stem)
        picture = f"{stem}.png"
        twin = root / "coco" / split / picture
        assert twin.read_bytes() == (root / "voc" / "JPEGImages" / picture).read_bytes()


@by_split
def test_the_written_images_are_the_drawn_ones(root: Path, split: Split) -> None:
    drawn = scene(3, split=split)
    with Image.open(root / "coco" / split / f"{split}_000003.png") as written:
        assert np.array_equal(np.asarray(written), drawn.image)
    objects = [(CLASS_NAMES[digit.label], int(digit.difficult), digit.box) for digit in drawn.digits]
    assert objects == voc_objects(root, f"{split}_000003")


@by_split
def test_one_to_five_digits_with_boxes_inside_the_image(split: Split) -> None:
    drawn = [scene(i, split=split, size=48) for i in range(100)]
    assert {len(one.digits) for one in drawn} == {1, 2, 3, 4, 5}
    assert {digit.label for one in drawn for digit in one.digits} == set(range(10))
    for one in drawn:
        assert one.image.shape == (48, 48, 3)
        assert one.image.dtype == np.uint8
        for left, top, right, bottom in (digit.box for digit in one.digits):
            assert 0 <= left < right <= 48
            assert 0 <= top < bottom <= 48


def test_boxes_are_tight_around_the_ink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_background", lambda rng, split, size: np.zeros((size, size, 3), np.float32))
    alone = [one for one in (scene(i, split="train") for i in range(40)) if len(one.digits) == 1]
    assert alone
    for one in alone:
        rows, columns = np.nonzero(one.image.max(axis=2))
        assert one.digits[0].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_a_few_digits_are_difficult() -> None:
    digits = [digit for i in range(400) for digit in scene(i, split="train").digits]
    assert 0.005 < np.mean([digit.difficult for digit in digits]) < 0.1


def test_covered_is_the_hidden_part_of_the_box() -> None:
    later = [(0, 0, 5, 10), (0, 0, 10, 5), (-9, -9, -1, -1), (20, 20, 30, 30)]
    assert scenes._covered((0, 0, 10, 10), later) == pytest.approx(0.75)


def test_digit_crops_are_labelled_and_repeatable() -> None:
    crops = [digit_crop(i, size=24) for i in range(200)]
    assert {label for _, label in crops} == set(range(10))
    assert all(pixels.shape == (24, 24, 3) and pixels.dtype == np.uint8 for pixels, _ in crops)
    again, label = digit_crop(7, size=24)
    assert np.array_equal(again, crops[7][0])
    assert label == crops[7][1]


def test_progress_counts_the_images(tmp_path: Path) -> None:
    seen: list[int] = []
    write_scenes(tmp_path / "data", train=3, val=2, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5]


def test_a_folder_with_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(DataError, match="not empty"):
        write_scenes(tmp_path, train=1, val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=1, val=1)
    assert {path.name for path in tmp_path.iterdir()} == {"voc", "coco"}


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)train: 0 .*val: -1 .*size: 8 .*seed: -2 "):
        write_scenes(tmp_path / "data", train=0, val=-1, size=8, seed=-2)


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    def fail(written: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "data", train=2, val=1, progress=fail)
    assert list(tmp_path.iterdir()) == []
